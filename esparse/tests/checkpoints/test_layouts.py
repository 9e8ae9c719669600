"""Checkpoints in every layout that stock transformers reads, composite ones too: esparse prunes and saves the same weights."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import esparse
from esparse.checkpoints.folder import INDEX, SINGLE
from esparse.checkpoints.layout import PREDICTING, Checkpoint, Group, Layout, written_config
from esparse.checkpoints.reader import CheckpointReader
from esparse.moe.identity import fingerprint
from esparse.moe.layers import moe_layers
from esparse.tests.conftest import EXHAUSTIVE, random_model, random_tokens, sampled
from esparse.tests.families import COMPOSITES, composite_model, family_model

TOKENS = random_tokens()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def write(folder: Path, state: dict[str, torch.Tensor], **config) -> Path:
    """The folder with these tensors in one file, and other entries in its config."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(state, folder / SINGLE, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    return folder


def run(model) -> torch.Tensor:
    model.set_experts_implementation("eager")
    with torch.no_grad():
        return model.eval()(TOKENS, use_cache=False).logits


def masked(model, plan) -> torch.Tensor:
    with esparse.masked(model, plan):
        return run(model)


# --- composite checkpoints ------------------------------------------------------------------------------------------------


def published(model_type: str, folder: Path) -> Path:
    """A tiny composite checkpoint with the names of the published one, layers that predict further tokens included."""
    composite_model(model_type).save_pretrained(folder)
    if model_type == "qwen3_vl_moe":  # on the hub experts are transposed, under the names of those that are not
        state = tensors(folder)
        return write(folder, {name: t.mT.contiguous() if ".mlp.experts." in name else t for name, t in state.items()})
    if model_type not in ("qwen3_5_moe", "qwen4_exp"):
        return folder
    state = tensors(folder)  # on the hub experts are stacked, those of the predicting layer are not
    for layer in range(3):
        start = f"model.language_model.layers.{layer}.mlp.experts."
        part = {
            name: [state.pop(f"{start}{e}.{name}.weight") for e in range(8)] for name in ("gate_proj", "up_proj", "down_proj")
        }
        pairs = zip(part["gate_proj"], part["up_proj"], strict=True)
        state[f"{start}gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        state[f"{start}down_proj"] = torch.stack(part["down_proj"])
    state |= {f"mtp.layers.0.mlp.experts.{e}.up_proj.weight": torch.randn(24, 32) for e in range(8)}
    state |= {"mtp.table": torch.arange(9, dtype=torch.uint8), "mtp.small": torch.randn(4).to(torch.float8_e4m3fn)}
    return write(folder, state | {"mtp.fc.weight": torch.randn(32, 64)})


# Towers beside a text model: experts stacked on the hub, transposed there, or neither; a head of its own; no causal model.
KINDS = ("qwen3_5_moe", "qwen3_vl_moe", "mistral3", "cohere2_vision", "minimax_m3_vl", "gemma4")


@pytest.mark.parametrize("model_type", sampled(COMPOSITES, KINDS))
def test_the_text_model_inside_is_pruned_and_the_rest_is_carried(model_type, tmp_path):
    source = published(model_type, tmp_path / "source")
    report = esparse.prune_checkpoint(source, tmp_path / "pruned", 6, calibration=TOKENS)
    whole = composite_model(model_type)
    plan = esparse.search_experts(esparse.trace(whole, TOKENS, keep=6), 6)
    assert [layer["kept"] for layer in report["layers"] if "kept" in layer] == plan.kept
    small, found = type(whole).from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not found["missing_keys"] and not found["mismatched_keys"]
    assert all(name.startswith("mtp.") for name in found["unexpected_keys"])
    assert torch.allclose(run(small), masked(whole, plan), rtol=0, atol=1e-5)
    before, after = tensors(source), tensors(tmp_path / "pruned")
    layout = Layout(CheckpointReader(source).config, 6)
    text = Checkpoint(CheckpointReader(source), layout).used
    assert all(after[name].shape == shape for name, shape in layout.small.items() if name in after)
    assert report["carried"] == len(before.keys() - set(text)) > 3 and not report["left_out"]
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - set(text))
    assert set(json.loads((tmp_path / "pruned" / INDEX).read_text())["weight_map"]) == after.keys()


def test_a_composite_is_loaded_traced_and_saved_as_stock_loads_it(tmp_path, tiny):
    """MiniMax-M3 has no causal language model: its own class is loaded, and pruned in memory as from disk."""
    source = published("minimax_m3_vl", tmp_path / "source")
    tiny[1].save_pretrained(source)
    model, tokenizer = esparse.load_model(str(source))
    assert type(model) is transformers.MiniMaxM3SparseForConditionalGeneration
    assert fingerprint(esparse.load_model(str(source), dtype="bf16")[0]) == fingerprint(model)
    plan = esparse.search_experts(esparse.trace(model, TOKENS, keep=6), 6)
    esparse.save_model(esparse.prune(model, plan), tokenizer, tmp_path / "memory", plan)
    esparse.prune_checkpoint(source, tmp_path / "disk", plan)
    one, other = tensors(tmp_path / "memory"), tensors(tmp_path / "disk")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_quantised_weights_may_be_told_of_by_the_text_part(tmp_path):
    source = published("kimi_k25", tmp_path / "source")
    entries = json.loads((source / "config.json").read_text())
    state = {name: tensor.bfloat16() for name, tensor in tensors(source).items()}
    for name in [name for name in state if name.startswith("language_model") and name.endswith("proj.weight")]:
        scale = torch.rand([size // 8 for size in state[name].shape]) + 0.5
        state |= {name: state[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
    told = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]}}
    write(source, state, text_config=entries["text_config"] | told, transformers_weights=SINGLE)
    report = esparse.prune_checkpoint(source, tmp_path / "whole", 8, calibration=TOKENS, method="reap", dtype="bfloat16")
    assert report["quantised"] == "fp8" and "quantization_config" not in (tmp_path / "whole" / "config.json").read_text()
    kind = transformers.AutoModelForImageTextToText
    before, after = (kind.from_pretrained(folder, dtype=torch.bfloat16) for folder in (source, tmp_path / "whole"))
    assert all(torch.equal(after.state_dict()[name], tensor) for name, tensor in before.state_dict().items())


# --- any layout -----------------------------------------------------------------------------------------------------------

FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3")


def stacked(model, state: dict[str, torch.Tensor], layers: set[int]) -> dict[str, torch.Tensor]:
    """The published state with the experts of these MoE layers as transformers holds them."""
    for number in layers & set(range(len(moe_layers(model)))):
        layer = moe_layers(model)[number]
        start = f"{layer.name}.experts.".replace("mlp", "(mlp|block_sparse_moe)")
        state = {name: tensor for name, tensor in state.items() if not re.match(start, name)}
        state |= {f"{layer.name}.experts.{name}": p.detach().clone() for name, p in layer.experts.named_parameters()}
    return state


def renumbered(state: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
    """Experts under numbers that only order them."""
    number = lambda part: str(step * int(part) + step - 1)  # noqa: E731
    parts = {name: name.partition(".experts.") for name in state}
    told = {name: rest.partition(".") for name, (_, _, rest) in parts.items()}
    return {
        f"{parts[name][0]}.experts.{number(told[name][0])}.{told[name][2]}" if told[name][0].isdigit() else name: tensor
        for name, tensor in state.items()
    }


CHOICES = {
    "family": FAMILIES,
    "stacked": [set(), {1}, {0, 2}, {0, 1, 2}],
    "prefix": ["model.", "", "language_model.model."],
    "step": [1, 3],
    "files": ["one", "several", "one beside the index of another"],
    "head": ["own", "tied", "tied, the head stored", "tied, both stored", "missing"],
    "towers": [False, True],
    "counts": [True, False],
}
EACH = [{name: choices[i % len(choices)] for name, choices in CHOICES.items()} for i in range(5)]  # every choice once


def laid_out(folder: Path, how: dict) -> Path:
    model = family_model(how["family"], tie_word_embeddings=how["head"].startswith("tied"))
    model.save_pretrained(folder)
    state = renumbered(stacked(model, tensors(folder), how["stacked"]), how["step"])
    state.pop("lm_head.weight", None)
    head, embeddings = model.lm_head.weight.detach().clone(), "model.embed_tokens.weight"
    state |= {} if how["head"] in ("tied", "missing") else {"lm_head.weight": head}
    if how["head"] == "tied, the head stored":
        del state[embeddings]
    state = {name.replace("model.", how["prefix"], 1) if name.startswith("model.") else name: t for name, t in state.items()}
    if how["towers"]:
        state |= {"vision_tower.layers.0.mlp.weight": torch.ones(3), "mtp.layers.0.mlp.gate.weight": torch.ones(8, 32)}
        state["vision_tower.position_ids"] = torch.arange(3)
    more = {"output_router_logits": True, "num_nextn_predict_layers": 1} if how["counts"] else {}
    write(folder, state, **more)
    if how["files"] != "one":
        other = state if how["files"] == "several" else {name: torch.zeros_like(t) for name, t in state.items()}
        if how["files"] == "several":
            (folder / SINGLE).unlink()
        names = sorted(other)
        places = {name: f"model-0000{1 + (i >= len(names) // 2)}-of-00002.safetensors" for i, name in enumerate(names)}
        for file in set(places.values()):
            save_file({name: other[name] for name in names if places[name] == file}, folder / file, metadata={"format": "pt"})
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.mark.parametrize("how", EACH, ids=lambda how: how["head"])
def test_whatever_stock_loads_is_pruned_and_nothing_else(how, tmp_path_factory):
    check_layout(how, tmp_path_factory)


@EXHAUSTIVE
@given(how=st.fixed_dictionaries({name: st.sampled_from(choices) for name, choices in CHOICES.items()}))
@settings(max_examples=40, deadline=None)
def test_any_mix_of_layouts(how, tmp_path_factory):
    check_layout(how, tmp_path_factory)


def check_layout(how, tmp_path_factory):
    folder = laid_out(tmp_path_factory.mktemp("layout") / "source", how)
    stock, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    if found["missing_keys"] or found["mismatched_keys"]:
        with pytest.raises(ValueError, match="which its config asks for|config asks for") as refused:
            esparse.prune_checkpoint(folder, folder.parent / "pruned", 6, calibration=TOKENS)
        assert "\n" not in str(refused.value) and not (folder.parent / "pruned").exists()
        return
    before = run(stock)
    esparse.prune_checkpoint(folder, folder.parent / "whole", 8, calibration=TOKENS, method="reap")
    assert torch.equal(run(transformers.AutoModelForCausalLM.from_pretrained(folder.parent / "whole")), before)
    esparse.prune_checkpoint(folder, folder.parent / "pruned", 6, calibration=TOKENS, method="reap")
    plan = esparse.PruningPlan.load(folder.parent / "pruned" / "plan.json")
    small, lacking = transformers.AutoModelForCausalLM.from_pretrained(folder.parent / "pruned", output_loading_info=True)
    assert not any(lacking[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.allclose(run(small), masked(stock, plan), rtol=0, atol=1e-5)
    config = json.loads((folder.parent / "pruned" / "config.json").read_text())
    assert not config.get("output_router_logits") and not any(config.get(name) for name in PREDICTING)
    model = family_model(how["family"])
    model.save_pretrained(folder.parent / "published")
    dropped = {"lm_head.weight", "model.embed_tokens.weight"}
    names = {name for name in tensors(folder.parent / "published") if ".experts.6." not in name and ".experts.7." not in name}
    assert tensors(folder.parent / "pruned").keys() - dropped == names - dropped
    shutil.rmtree(folder.parent)


@pytest.mark.parametrize(("family", "other"), [("qwen2_moe", "num_local_experts"), ("granitemoe", "num_experts")])
def test_a_count_that_the_model_does_not_know_is_none(family, other, tmp_path):
    model = family_model(family)
    model.save_pretrained(tmp_path / "source")
    write(tmp_path / "source", tensors(tmp_path / "source"), **{other: 16})
    esparse.prune_checkpoint(tmp_path / "source", tmp_path / "pruned", 6, calibration=TOKENS, method="reap")
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert {layer.n for layer in moe_layers(small)} == {6}
    assert torch.allclose(run(small), masked(model, esparse.PruningPlan.load(tmp_path / "pruned/plan.json")), rtol=0, atol=1e-5)
    config = transformers.Qwen2MoeConfig(num_local_experts=60)  # as many as Qwen2-MoE has where nothing is said
    entries, _ = written_config({"num_local_experts": 60}, config, 6, predicting=False)
    assert transformers.Qwen2MoeConfig(**entries).num_experts == 6


# --- saving and telling models apart --------------------------------------------------------------------------------------


def test_a_model_read_from_stacked_experts_is_saved_in_the_published_layout(tmp_path, tiny):
    model = random_model("mixtral", 8, 2, dtype=torch.float32, output_router_logits=True)
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    model.save_pretrained(tmp_path / "published")
    tiny[1].save_pretrained(tmp_path / "stacked")
    assert any("gate_up_proj" in name for name in tensors(tmp_path / "stacked"))
    again, tokenizer = esparse.load_model(str(tmp_path / "stacked"))
    esparse.save_model(again, tokenizer, tmp_path / "saved")
    one, other = tensors(tmp_path / "saved"), tensors(tmp_path / "published")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["output_router_logits"] is False


def test_a_model_that_is_held_quantised_is_saved_with_what_says_so(tmp_path, tiny):
    model = random_model("mixtral", 8, 2, dtype=torch.float32)
    model.config.quantization_config = transformers.FineGrainedFP8Config(weight_block_size=(16, 16))
    model._weight_conversions = []  # as transformers would have it for a model that is read as it is held
    esparse.save_model(model, tiny[1], tmp_path / "saved")
    said = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "fp8" and said["weight_block_size"] == [16, 16]
    assert tensors(tmp_path / "saved").keys() == model.state_dict().keys()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_is_told_by_its_stored_bits_whatever_dtype_holds_it(stored, tmp_path, tiny):
    for seed, name in enumerate(("source", "other")):
        random_model("mixtral", 8, 2, seed=seed, dtype=stored).save_pretrained(tmp_path / name)
        tiny[1].save_pretrained(tmp_path / name)
    source = str(tmp_path / "source")
    names = {fingerprint(esparse.load_model(source, dtype=dtype)[0]) for dtype in ("float32", "bf16", "fp16", "auto")}
    traces = [
        esparse.trace_checkpoint(source, TOKENS, tmp_path / str(dtype), dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert names == {trace.model for trace in traces} and len(names) == 1
    assert fingerprint(esparse.load_model(str(tmp_path / "other"), dtype="bf16")[0]) not in names
    plan = esparse.search_experts(traces[0], 6)
    model = esparse.load_model(source, dtype="bf16")[0]
    with esparse.masked(model, plan):  # made in float32, used in bfloat16
        run(model)
    assert esparse.prune_checkpoint(source, tmp_path / "pruned", plan)["r"] == 6
    moe_layers(model)[0].gate.weight.data[0, 0] += 1  # no longer what was loaded
    with pytest.raises(ValueError, match="made with another model"), esparse.masked(model, plan):
        pass


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts_joined_in_one_copy_are_those_of_transformers_converter(family, tmp_path, monkeypatch):
    family_model(family).save_pretrained(tmp_path)
    reader = CheckpointReader(tmp_path)
    groups = [group for group in Checkpoint(reader, Layout(reader.config, 8)).of.values() if group.converter]
    joined = {group.parameter: found for group in groups if (found := group._joined(reader.read)) is not None}
    assert joined and len(joined) < len(groups)
    monkeypatch.setattr(Group, "_joined", lambda group, read: None)
    for group in groups:
        expected = group.make(Layout(reader.config, 8).model, reader.read)[group.parameter]
        assert torch.equal(joined.get(group.parameter, expected), expected)
