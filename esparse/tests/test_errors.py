"""Bad input: each case raises an error early, in one clear sentence."""

import copy
import gzip
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import esparse
from esparse import corpora
from esparse.__main__ import main
from esparse.checkpoints import layout
from esparse.checkpoints.models import read_betas, read_dtype
from esparse.experiments import acceptance
from esparse.files import data_folder
from esparse.moe.layers import moe_layers
from esparse.tests.conftest import SHAPE, random_model, random_tokens


@pytest.mark.parametrize("r", [1, 9])
def test_r_below_top_k_or_above_n(tiny_trace, r):
    with pytest.raises(ValueError, match=f"Cannot keep {r} experts: a token is routed to 2 of 8"):
        esparse.search_experts(tiny_trace, r)


def test_kept_experts_that_are_no_subset(tiny_trace):
    for kept in ([0, 1, 1, 2], [0, 1, 8, 3], [-1, 0, 1, 2], []):
        with pytest.raises(ValueError, match="different numbers from 0 to 7"):
            esparse.reconstruction_loss(tiny_trace.layers[0], kept)


@pytest.mark.parametrize("beta", [-0.1, math.nan, math.inf, "0.5", None])
def test_beta_negative_or_no_number(tiny, tiny_trace, beta):
    with pytest.raises(ValueError, match="beta must be a finite number that is not negative"):
        esparse.enable_skipping(tiny[0], [0.5] * 5 + [beta])
    if beta is not None:
        with pytest.raises(ValueError, match="beta must be"):
            esparse.reconstruction_loss(tiny_trace.layers[0], None, beta)
    assert tiny[0].config._experts_implementation != "esparse_skipping"


@pytest.mark.parametrize("betas", [[0.5] * 5, [], 0.5])
def test_wrong_number_of_betas(tiny, betas):
    with pytest.raises(ValueError, match="one beta per MoE layer: the model has 6, got"):
        esparse.enable_skipping(tiny[0], betas)


def test_one_expert_cannot_skip():
    model = random_model("mixtral", 4, 1)
    with pytest.raises(ValueError, match="routes each token to one expert"):
        esparse.enable_skipping(model, [0.5] * 3)
    with pytest.raises(ValueError, match="routes each token to one expert"):
        esparse.median_betas(esparse.trace(model, random_tokens()))


def test_corpus_that_is_not_there(tiny, tmp_path):
    with pytest.raises(
        ValueError, match="Unknown corpus 'wiki': choose from c4, math, gsm8k, metamath, web, arithmetic, or give a path"
    ):
        esparse.calibration_tokens("wiki", tiny[1])
    with pytest.raises(ValueError, match="no such split"):
        esparse.calibration_tokens("web/test", tiny[1])
    with pytest.raises(FileNotFoundError, match="no corpus file at"):
        esparse.calibration_tokens(str(tmp_path / "nothing.txt"), tiny[1])
    (tmp_path / "corpus.docx").write_text("a,b")
    with pytest.raises(ValueError, match="is not a .txt"):
        esparse.calibration_tokens(str(tmp_path / "corpus.docx"), tiny[1])


def test_corpus_empty_or_too_short(tiny, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="is empty: it has 0 tokens"):
        esparse.calibration_tokens(str(tmp_path / "empty.txt"), tiny[1])
    (tmp_path / "short.txt").write_text("Ada keeps a goat.")
    tokens = len(tiny[1]("Ada keeps a goat.").input_ids)
    with pytest.raises(ValueError, match=f"too short: its 1 documents have {tokens} tokens, which pack into 0 sequences of 64"):
        esparse.calibration_tokens(str(tmp_path / "short.txt"), tiny[1], sequences=2, length=64)


def test_malformed_json_line(tiny, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": "fine"}\n\n{"text": "broken\n')
    with pytest.raises(ValueError, match=r"broken.jsonl, line 3 is not valid JSON"):
        esparse.calibration_tokens(str(path), tiny[1])
    path.write_text('{"text": "fine"}\n{"title": "no text"}\n')
    with pytest.raises(ValueError, match=r"line 2 has neither 'text' nor"):
        esparse.calibration_tokens(str(path), tiny[1])
    whole = gzip.compress(json.dumps({"text": "fine" * 1000}).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        esparse.calibration_tokens(str(tmp_path / "cut.jsonl.gz"), tiny[1])


def test_bad_calibration_sizes(tiny):
    with pytest.raises(ValueError, match="at least 1"):
        esparse.calibration_tokens("web", tiny[1], sequences=0)
    with pytest.raises(ValueError, match="Unknown protocol"):
        esparse.calibration_tokens("web", tiny[1], protocol="mine")


def test_token_ids_outside_the_vocabulary(tiny):
    for bad in (-1, 1024):
        with pytest.raises(ValueError, match=f"Token id {bad} is outside the vocabulary of 1024"):
            esparse.trace(tiny[0], torch.tensor([[1, bad]]))
    with pytest.raises(ValueError, match="integer ids of shape"):
        esparse.trace(tiny[0], torch.tensor([1, 2]))


def test_model_without_moe_layers():
    dense = {k: v for k, v in SHAPE.items()}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**dense))
    with pytest.raises(ValueError, match="LlamaForCausalLM has no MoE layers"):
        esparse.trace(model, random_tokens())


def test_router_of_an_unknown_kind():
    model = random_model("mixtral", 4, 2)
    gate = moe_layers(model)[0].gate
    stock = type(gate).forward

    def tempered(hidden_states):
        logits, weights, chosen = stock(gate, hidden_states)
        return logits, weights**2, chosen

    gate.forward = tempered
    with pytest.raises(ValueError, match="computes its routing weights or its choice in a way not known"):
        esparse.trace(model, random_tokens())


@pytest.mark.parametrize(
    ("where", "message"), [("gate", "router logits are not finite"), ("experts", "expert outputs are not")]
)
def test_nan_during_calibration(where, message):
    model = random_model("mixtral", 4, 2)
    layer = moe_layers(model)[1]
    with torch.no_grad():
        if where == "gate":  # NaN in the weights would be no router at all: let the hidden states overflow instead
            moe_layers(model)[0].experts.down_proj[:] = float("inf")
            message = "model.layers.0.mlp: expert outputs are not finite"
        else:
            layer.experts.down_proj[:] = float("nan")
    with pytest.raises(ValueError, match=message):
        esparse.trace(model, random_tokens())
    assert model.config._experts_implementation == "eager"
    assert not any(hasattr(module, "esparse_recorder") for module in model.modules())


def test_nan_in_router_logits():
    model = random_model("mixtral", 4, 2)
    norm = model.model.layers[1].post_attention_layernorm
    norm.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="layers.1.mlp: router logits are not finite"):
        esparse.trace(model, random_tokens())


def test_trace_asked_for_less_than_it_was_made_for():
    traced = esparse.trace(random_model("mixtral", 8, 2), random_tokens(), keep=6)
    with pytest.raises(ValueError, match="answers down to 6 experts, not 5: trace again with keep=5"):
        esparse.search_experts(traced, 5)
    with pytest.raises(ValueError, match="Cannot keep 9 experts"):
        esparse.trace(random_model("mixtral", 8, 2), random_tokens(), keep=9)


def test_trace_or_plan_used_with_another_model():
    model, other, tokens = random_model("mixtral", 8, 2), random_model("mixtral", 8, 2, seed=1), random_tokens()
    traced = esparse.trace(model, tokens)
    with pytest.raises(ValueError, match="trace was made with another model"):
        esparse.search_experts(traced, 6, method="progressive", model=other, tokens=tokens)
    with pytest.raises(ValueError, match="not the tokens the trace was made from"):
        esparse.search_experts(traced, 6, method="progressive", model=model, tokens=tokens[:2])
    with pytest.raises(ValueError, match="pass model= and the tokens="):
        esparse.search_experts(traced, 6, method="progressive")
    plan = esparse.search_experts(traced, 6)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match="pruning plan was made with another model"):
        esparse.prune(other, plan)
    with pytest.raises(ValueError, match="pruning plan was made with another model"), esparse.masked(other, plan):
        pass
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_plan_that_does_not_fit_changes_nothing():
    model = random_model("mixtral", 8, 2)
    plan = esparse.search_experts(esparse.trace(model, random_tokens()), 6)
    for kept in ([[0, 1, 2, 3, 4]] * 3, [[0, 1, 2, 3, 4, 4]] * 3, [[0, 1, 2, 3, 4, 8]] * 3, plan.kept[:2]):
        wrong = (
            copy.replace(plan, kept=kept) if hasattr(copy, "replace") else esparse.PruningPlan(**{**vars(plan), "kept": kept})
        )
        with pytest.raises(ValueError, match="plan"):
            esparse.prune(model, wrong)
        assert moe_layers(model)[0].n == 8


def test_unknown_method_and_too_many_subsets(tiny_trace):
    with pytest.raises(ValueError, match="Unknown method 'magic': choose from enumerate, greedy"):
        esparse.search_experts(tiny_trace, 6, method="magic")
    model = random_model("mixtral", 32, 2)
    with pytest.raises(ValueError, match="too many to enumerate: use method='greedy'"):
        esparse.search_experts(esparse.trace(model, random_tokens(1, 8)), 16)
    assert len(esparse.search_experts(esparse.trace(model, random_tokens(1, 8)), 31).kept[0]) == 31


def test_truncated_trace(tmp_path):
    folder = tmp_path / "trace"
    esparse.trace(random_model("mixtral", 4, 2), random_tokens()).save(folder)
    path = folder / "layer_01.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="layer_01.safetensors is missing or truncated"):
        esparse.Trace.load(folder)
    (folder / "trace.json").write_text('{"model": "x"')
    with pytest.raises(ValueError, match="is not a readable trace"):
        esparse.Trace.load(folder)
    with pytest.raises(FileNotFoundError, match="no trace at"):
        esparse.Trace.load(tmp_path / "nowhere")


def test_trace_of_another_version(tmp_path):
    model = random_model("mixtral", 4, 2)
    esparse.trace(model, random_tokens()).save(tmp_path / "trace")
    about = json.loads((tmp_path / "trace" / "trace.json").read_text())
    del about["format"]
    (tmp_path / "trace" / "trace.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="saved by another version of esparse: trace again"):
        esparse.Trace.load(tmp_path / "trace")


def test_destination_that_exists(tmp_path, tiny, tiny_trace):
    (tmp_path / "there").mkdir()
    plan = esparse.search_experts(tiny_trace, 6)
    for save in (
        lambda path: tiny_trace.save(path),
        lambda path: plan.save(path),
        lambda path: esparse.save_model(*tiny, path),
    ):
        with pytest.raises(FileExistsError, match="already exists: choose another destination"):
            save(tmp_path / "there")
    assert list(tmp_path.iterdir()) == [tmp_path / "there"] and not list((tmp_path / "there").iterdir())


@pytest.mark.parametrize(
    ("corpus", "alternatives"),
    [("c4", "offline there are 'web' and 'arithmetic'"), ("math", "'gsm8k' is the usual substitute"), ("gsm8k", "local file")],
)
@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_no_network_for_a_corpus(tiny, corpus, alternatives):
    with pytest.raises(ConnectionError, match=f"Could not get the corpus '{corpus}' from the hub .*{alternatives}"):
        esparse.calibration_tokens(corpus, tiny[1])


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_no_network_for_a_model():
    with pytest.raises(
        ConnectionError, match="Could not get the model 'nobody/nothing' from the hub .*'tiny-scratch' and local folders"
    ):
        esparse.load_model("nobody/nothing")
    with pytest.raises(FileNotFoundError, match="no model folder at /nowhere"):
        esparse.load_model("/nowhere")


@pytest.mark.parametrize("status", [401, 403])
def test_no_access(status):
    class Refused(OSError):
        response = type("Response", (), {"status_code": status})()

    def load():
        try:
            raise Refused("gated")
        except Refused as error:
            raise OSError("a long story") from error

    with pytest.raises(
        PermissionError, match=r"access to the model 'org/gated': ask for it at https://huggingface.co/org/gated"
    ):
        corpora.from_hub(load, "the model 'org/gated'", "org/gated", "nothing")


def test_unknown_task(tiny):
    with pytest.raises(ValueError, match="Unknown task 'nonsense': take one of web_facts"):
        esparse.evaluate(*tiny, ["nonsense"])


# --- names of dtypes, and what transformers cannot load --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        (("bfloat16", "bf16", "BF16", "torch.bfloat16", torch.bfloat16), torch.bfloat16),
        (("float16", "fp16", "half", torch.float16), torch.float16),
        (("float32", "fp32", "float", torch.float32), torch.float32),
        (("float64", "fp64", "double"), torch.float64),
        (("auto", None), None),
    ],
)
def test_the_names_of_a_dtype(names, dtype):
    assert all(read_dtype(name) == dtype for name in names)
    assert all(read_dtype(name, eight_bits=True) == dtype for name in names)


def test_a_dtype_that_nobody_knows_is_refused_wherever_one_is_taken(tmp_path, capsys):
    assert read_dtype("int8", eight_bits=True) == "int8"
    known = "take one of bfloat16, float16, float32, float64, auto"
    for call in (
        lambda name: esparse.load_model("tiny", dtype=name),
        lambda name: esparse.Run(dtype=name),
        lambda name: esparse.preflight("data/tiny", 6, dtype=name),
        lambda name: esparse.prune_checkpoint("data/tiny", tmp_path / "out", 6, calibration=random_tokens(), dtype=name),
        lambda name: esparse.trace_checkpoint("data/tiny", random_tokens(), tmp_path / "out", dtype=name),
    ):
        with pytest.raises(ValueError, match=f"Unknown dtype 'nonsense': {known}"):
            call("nonsense")
    for command in (["prune", "data/tiny", "out", "--experts", "6"], ["weights", "data/tiny", "out", "--sparsity", "0.5"]):
        with pytest.raises(SystemExit):
            main([*command, "--dtype", "int8"])
        assert f"Unknown dtype 'int8': {known}." in capsys.readouterr().err
    with pytest.raises(ValueError, match="Unknown dtype 'int8'"):
        esparse.load_model("tiny-16", dtype="int8")
    assert not list(tmp_path.iterdir())
    assert esparse.Run(dtype="bf16").dtype == "bfloat16" and esparse.Run(dtype="auto").dtype is None
    assert esparse.load_model("tiny", dtype="half")[0].dtype == torch.float16


def one_sentence(call, *parts: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    said = str(error.value)
    assert len(said) < 320 and "\n" not in said and all(part in said for part in parts), said


@pytest.mark.parametrize("family", ["mixtral", "qwen3"])
def test_a_folder_without_a_tokenizer(family, tmp_path):
    """Of Qwen's and others' transformers makes an empty tokenizer, which finds no token in any text."""
    random_model(family, 8, 2, dtype=torch.float32).save_pretrained(tmp_path / "source")
    parts = (f"{tmp_path / 'source'} has no tokenizer", "there is no tokenizer.json", "Copy tokenizer.json and")
    one_sentence(lambda: esparse.load_model(str(tmp_path / "source")), *parts)
    one_sentence(lambda: esparse.prune_checkpoint(tmp_path / "source", tmp_path / "out", 6, calibration="web"), *parts)
    one_sentence(
        lambda: esparse.prune_weights_checkpoint(tmp_path / "source", tmp_path / "out", "2:4", calibration="web"), *parts
    )
    assert not (tmp_path / "out").exists()
    report = esparse.prune_checkpoint(tmp_path / "source", tmp_path / "out", 6, calibration=random_tokens())
    plan = esparse.PruningPlan.load(tmp_path / "out" / "plan.json")
    again = esparse.prune_checkpoint(tmp_path / "source", tmp_path / "again", plan)  # neither needs one
    assert [layer["kept"] for layer in report["layers"]] == [layer["kept"] for layer in again["layers"]] == plan.kept


@pytest.mark.parametrize(
    ("family", "file", "content", "part"),
    [
        ("mixtral", "tokenizer.model", "no protobuf", "transformers cannot read its tokenizer.model"),
        ("mixtral", "tokenizer.json", "{", "Expecting property name"),
        ("mixtral", "vocab.txt", "a", "transformers finds no tokenizer.json, or one it does not read"),
        ("qwen3", "vocab.txt", "a", "transformers makes an empty one of what is there"),
    ],
)
def test_a_tokenizer_that_cannot_be_read(family, file, content, part, tmp_path):
    random_model(family, 8, 2, dtype=torch.float32).save_pretrained(tmp_path)
    (tmp_path / file).write_text(content)
    one_sentence(lambda: esparse.load_model(str(tmp_path)), f"{tmp_path} has no tokenizer that can be loaded: {part}")


def test_a_model_that_is_no_causal_language_model(tmp_path, tiny):
    shape = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "num_experts": 2}
    transformers.SwitchTransformersForConditionalGeneration(
        transformers.SwitchTransformersConfig(**shape, vocab_size=50)
    ).save_pretrained(tmp_path / "source")
    tiny[1].save_pretrained(tmp_path / "source")
    for call in (
        lambda: esparse.load_model(str(tmp_path / "source")),
        lambda: layout.stock_class(transformers.AutoConfig.from_pretrained(tmp_path / "source")),
        lambda: layout.Layout(transformers.AutoConfig.from_pretrained(tmp_path / "source"), 2),
    ):
        one_sentence(call, "has no language model of type 'switch_transformers'")


def test_a_folder_that_transformers_cannot_load(tmp_path, tiny):
    source = tmp_path / "source"
    random_model("mixtral", 8, 2, dtype=torch.float32).save_pretrained(source)
    tiny[1].save_pretrained(source)
    weights, config = (source / "model.safetensors").read_bytes(), json.loads((source / "config.json").read_text())
    (source / "model.safetensors").write_bytes(weights[:5000])
    one_sentence(lambda: esparse.load_model(str(source)), "model.safetensors is truncated or corrupt")
    (source / "model.safetensors").write_bytes(weights)
    (source / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    one_sentence(
        lambda: esparse.load_model(str(source)), "lm_head.weight is of shape [60, 32], but its config asks for [60, 64]"
    )
    (source / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    one_sentence(lambda: esparse.load_model(str(source)), "is of model type 'unheard_of', which transformers")


LLM_COMPRESSOR = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # its names of Mixtral's experts, seen in 0.14


def rewrite(folder, rename, **more) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in state.items()} | more, folder / "model.safetensors", {"format": "pt"})


def test_tensors_that_transformers_would_make_up(tmp_path, tiny):
    source = tmp_path / "source"
    random_model("mixtral", 4, 2, dtype=torch.float32).save_pretrained(source)
    tiny[1].save_pretrained(source)
    calls = (
        lambda: esparse.load_model(str(source)),
        lambda: esparse.prune_checkpoint(source, tmp_path / "out", 3, calibration=random_tokens()),
        lambda: esparse.kept_experts(source, source),
    )
    esparse.load_model(str(source))
    rewrite(source, lambda name: re.sub(r"w[123](?=\.weight$)", lambda found: LLM_COMPRESSOR[found[0]], name))
    _, report = transformers.AutoModelForCausalLM.from_pretrained(source, output_loading_info=True)
    assert len(report["missing_keys"]) == 6  # random experts, without an error
    for call in calls:
        one_sentence(call, "has no tensor model.layers.0.block_sparse_moe.experts.0.w1.weight and 35 more")
        one_sentence(call, "block_sparse_moe.experts.0.down_proj.weight, a name of llm-compressor")
    random_model("mixtral", 4, 2, dtype=torch.float32).save_pretrained(source)
    rewrite(source, lambda name: name.replace("layers.1.block_sparse_moe.gate.", "layers.1.block_sparse_moe.other."))
    for call in calls:
        one_sentence(call, "has no tensor model.layers.1.block_sparse_moe.gate.weight, which its config asks for.")
    # What esparse cannot check by names is checked when transformers has loaded it.
    change = {"quantization_config": {"quant_method": "fp8", "modules_to_not_convert": ["model", "lm_head"]}}
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | change))
    one_sentence(calls[0], "has no tensor model.layers.1.mlp.gate.weight, which its config asks for.")


def test_an_adapter_that_is_not_merged(tmp_path, tiny):
    source, adapter = tmp_path / "source", "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    random_model("mixtral", 4, 2, dtype=torch.float32).save_pretrained(source)
    tiny[1].save_pretrained(source)
    rewrite(source, lambda name: name, **{adapter: torch.ones(2, 32)})
    for call in (esparse.load_model, lambda path: esparse.prune_checkpoint(path, tmp_path / "out", 3), esparse.preflight):
        one_sentence(lambda: call(str(source)), f"{source} holds an adapter (tensor {adapter}): merge it first")  # noqa: B023
    model = random_model("mixtral", 4, 2)
    model.model.layers[0].self_attn.q_proj.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(32, 2)})
    for call in (lambda: esparse.trace(model, random_tokens()), lambda: esparse.save_model(model, tiny[1], tmp_path / "out")):
        one_sentence(
            call, "This model holds an adapter (model.layers.0.self_attn.q_proj.lora_A.default.weight): merge it first"
        )
    assert not (tmp_path / "out").exists()


def test_experts_that_were_taken_apart():
    model = random_model("mixtral", 4, 2)
    for layer in moe_layers(model):
        layer.block.experts = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(4))
    one_sentence(lambda: esparse.trace(model, random_tokens()), "The experts in model.layers.0.mlp.experts are not behind")


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao"])
def test_what_others_hold_is_not_saved(method, tmp_path, tiny):
    model = random_model("mixtral", 4, 2)
    model.config.quantization_config = SimpleNamespace(quant_method=method)
    one_sentence(lambda: esparse.save_model(model, tiny[1], tmp_path / "out"), f"{method} holds weights of this model: save it")
    assert not list(tmp_path.iterdir())


def test_experts_in_eight_bits_are_not_traced():
    model = random_model("mixtral", 4, 2, dtype=torch.float32)
    plan = esparse.search_experts(esparse.trace(model, random_tokens()), 3)
    experts = moe_layers(model)[1].experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.to(torch.int8), requires_grad=False)
    for call in (lambda: esparse.trace(model, random_tokens()), lambda: esparse.prune(model, plan)):
        one_sentence(call, "Weights of this model are held quantised: load it without quantisation")
    assert [layer.n for layer in moe_layers(model)] == [4, 4, 4]


def test_a_device_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, part in (
        ("nonsense", "Unknown device 'nonsense'"),
        ("cuda:1", "There is no device cuda:1 here: torch sees 1 GPU"),
    ):
        one_sentence(lambda: esparse.load_model("tiny", device=name), part)  # noqa: B023
        options = {"calibration": random_tokens(), "device": name}
        one_sentence(lambda: esparse.prune_checkpoint("data/tiny", tmp_path / "out", 6, **options), part)  # noqa: B023
    assert not list(tmp_path.iterdir())


# --- files that hold something else ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [{"kept": None}, {"kept": [[0.5, 1]]}, {"kept": [0, 1]}, {"r": "6"}, {"losses": None}, {"losses": []}, {"more": 1}],
)
def test_a_file_that_is_no_plan(changed, tmp_path):
    about = {"method": "greedy", "r": 2, "kept": [[0, 1]], "losses": [0.0], "model": "", "tokens": ""}
    (tmp_path / "plan.json").write_text(json.dumps(about))
    assert esparse.PruningPlan.load(tmp_path / "plan.json").kept == [[0, 1]]
    (tmp_path / "plan.json").write_text(json.dumps(about | changed))
    one_sentence(lambda: esparse.PruningPlan.load(tmp_path / "plan.json"), "plan.json is no pruning plan of esparse.")


@pytest.mark.parametrize("content", ["3", '"0.5"', '{"beta": [0.5]}', '{"betas": 0.5}', "{"])
def test_a_file_without_betas(content, tmp_path, capsys):
    path = tmp_path / "betas.json"
    path.write_text(content)
    one_sentence(lambda: read_betas(path), "betas.json")
    words = ["evaluate", "tiny", "--tasks", "web_facts", "--run-dir", str(tmp_path / "run"), "--betas"]
    assert main([*words, str(path)]) == 2 and "betas.json" in capsys.readouterr().err
    assert main([*words, str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"esparse: {tmp_path} cannot be read as a file of betas: Is a directory.\n"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ([], "config.json is no model config: it holds no JSON object"),
        ({"num_local_experts": "x"}, "config.json: Validation error for field 'num_local_experts'"),
        ({"quantization_config": "fp8"}, "transformers cannot take"),
    ],
)
def test_a_config_that_transformers_cannot_take(change, part, tmp_path):
    config = json.loads((data_folder() / "tiny" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change if isinstance(change, dict) else change))
    for call in (esparse.load_model, esparse.preflight):
        one_sentence(lambda: call(str(tmp_path)), part)  # noqa: B023


def test_a_destination_below_a_file(tmp_path, tiny, capsys):
    (tmp_path / "file").write_text("x")
    for call in (
        lambda: esparse.save_model(*tiny, tmp_path / "file" / "out"),
        lambda: esparse.prune_checkpoint("data/tiny", tmp_path / "file" / "out", 6),
        lambda: esparse.Run(folder=tmp_path / "file"),
    ):
        with pytest.raises(NotADirectoryError, match=r"file is a file"):
            call()


@pytest.mark.parametrize("value", ["0", "-1", "2.5", "x"])
def test_a_count_that_is_none(value, capsys):
    with pytest.raises(SystemExit):
        main(["prune", "data/tiny", "out", "--experts", value])
    assert f"argument --experts: must be a whole number from 1 on, got '{value}'" in capsys.readouterr().err


def test_parameters_of_a_run_that_nobody_knows(tiny, tmp_path):
    one_sentence(lambda: esparse.Run(method="magic"), "Unknown method 'magic'")
    one_sentence(lambda: esparse.Run(keep=["six"]), "whole numbers of experts, got ['six']")
    one_sentence(lambda: esparse.Run(keep=9, folder=tmp_path).sizes, "Cannot keep 9 experts: a token is routed to 2 of 8")
    one_sentence(lambda: esparse.Run(keep=[6, 1], folder=tmp_path).sizes, "Cannot keep 1 experts")
    assert esparse.Run(keep=6, folder=tmp_path).sizes == [6] and esparse.Run(keep=(5, 7, 5), folder=tmp_path).sizes == [7, 5]
    assert [esparse.Run(keep=keep, folder=tmp_path).size for keep in (6, [7, 5], [4, 6, 7])] == [6, 5, 6]
    run = esparse.Run(keep=8, folder=tmp_path)
    with pytest.warns(UserWarning, match="Nothing is pruned here: KEEP asks for no other size. Results for r = 8 are those of"):
        assert run.sizes == [8]


def test_options_of_the_acceptance_run(tmp_path):
    run = lambda **options: acceptance.acceptance(str(data_folder() / "tiny"), folder=tmp_path, **options)  # noqa: E731
    one_sentence(lambda: run(nope=3), "There is no parameter NOPE: take general, domain, batch_size")
    one_sentence(lambda: run(keep=[4]), "There is no parameter KEEP")
    one_sentence(lambda: run(general="web", domain="web"), "Both corpora are called web (synthetic)")
    assert not list(tmp_path.iterdir())
