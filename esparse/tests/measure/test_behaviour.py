"""A pruned folder beside the full model: the numbers are those of stock transformers, in memory and from disk alike."""

import json

import pytest
import torch
import transformers

import esparse
from esparse.checkpoints import models
from esparse.measure.behaviour import Pair, check_folder, generate, is_json, loops
from esparse.tests.conftest import assert_greedy, random_model, random_tokens

CHAT = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
SHAPE = {"vocab_size": 1024, "hidden_size": 64, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def pair(tiny, tmp_path_factory):
    """Folders of a random model with all experts, and with 4 of 6; the tokenizer has a chat template."""
    folders = [tmp_path_factory.mktemp("pair") / name for name in ("pruned", "full")]
    tiny[1].chat_template = CHAT
    for folder, kept in zip(folders, ([[0, 2, 3, 5]] * 2, None), strict=True):
        model = random_model("mixtral", 6, 2, dtype=torch.float32, **SHAPE)
        if kept:
            digest = esparse.trace(model, random_tokens()).model
            esparse.prune(model, esparse.PruningPlan("given", 4, kept, [None] * 2, digest, ""))
        esparse.save_model(model, tiny[1], folder)
    tiny[1].chat_template = None
    return folders


@torch.no_grad()
def stock(folders, tokens) -> dict:
    """Perplexities, KL and agreement from the definitions, in float64, by models that transformers loads."""
    models = [transformers.AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64).eval() for f in folders]
    for model in models:
        model.set_experts_implementation("eager")
    pruned, full = (model(tokens).logits.log_softmax(-1) for model in models)
    losses = [model(tokens, labels=tokens).loss for model in models]
    return {
        "perplexity": dict(zip(("pruned", "full"), [loss.exp().item() for loss in losses], strict=True)),
        "KL": (full.exp() * (full - pruned)).sum(-1).mean().item(),
        "agreement": (full.argmax(-1) == pruned.argmax(-1)).double().mean().item(),
    }


@pytest.mark.parametrize("streamed", [False, True])
def test_distances_are_those_of_stock_transformers(pair, streamed, monkeypatch):
    monkeypatch.setattr(models, "free_memory", lambda device: 0 if streamed else 1e12)
    both = Pair(*pair, dtype="float32")
    texts = {name: both.held_out(name, 9, 24) for name in ("web", "arithmetic")}
    found = {finding.name: finding for finding in both.findings(texts)}
    assert bool(both.models) is not streamed
    for name, tokens in texts.items():
        expected = stock(pair, tokens)
        for which in ("pruned", "full"):
            assert found[f"perplexity, {name}"].value[which] == pytest.approx(expected["perplexity"][which], rel=1e-4)
        assert found[f"KL, {name}"].value == pytest.approx(expected["KL"], rel=1e-3)
        assert found[f"agreement, {name}"].value == pytest.approx(expected["agreement"], abs=0.02)
    assert ("larger than the free memory" in found["loops"].note) is streamed


def test_a_model_agrees_with_itself(pair):
    both = Pair(pair[1], pair[1])
    found = {finding.name: finding.value for finding in both.findings({"web": both.held_out("web", 2, 40)})}
    assert found["KL, web"] == pytest.approx(0, abs=1e-5) and found["agreement, web"] == found["continuations"] == 1
    assert all(found[name]["pruned"] == found[name]["full"] for name in ("loops", "JSON replies", "ended"))


def test_held_out_text_is_not_what_models_are_calibrated_on(pair):
    tokens = Pair(*pair).held_out("web", 4, 32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(pair[1])
    assert torch.equal(tokens, esparse.calibration_tokens("web/heldout", tokenizer, sequences=4, length=32))


def test_generation_is_greedy_and_stops_at_the_end():
    model, tokens = random_model("mixtral", 4, 2), random_tokens(3, 8)
    model.generation_config.eos_token_id = None
    texts = generate(model, tokens, new=12)
    assert_greedy(model, torch.cat([tokens, torch.tensor(texts)], 1), 8)
    model.generation_config.eos_token_id = end = texts[0][4]
    assert all(
        short == text[: text.index(end) + 1 if end in text else None]
        for short, text in zip(generate(model, tokens, new=12), texts, strict=True)
    )


def test_a_loop_is_a_cycle_to_the_end():
    start = [*range(50, 90)]
    assert loops(start + [7] * 24) and not loops(start + [7] * 23)
    assert loops(start + [1, 2, 3] * 8) and not loops(start + [1, 2, 3] * 8 + [9])
    long = [*range(20)]
    assert loops(start + long * 3) and not loops(start + long * 2) and loops(start + long * 3 + long[:5])
    assert not loops(start) and not loops([])
    assert not loops(start + [7] * 30, ends={7})


def test_json_is_an_object_or_an_array():
    assert is_json(' {"a": 1}\n') and is_json("```json\n[1, 2]\n```") and is_json("[]")
    assert not any(map(is_json, ["", "4", "Sure: {}", '{"a": 1', "{'a': 1}", "[1] and more"]))


def test_the_command_prints_a_table_and_writes_what_it_says(pair, call, tmp_path):
    out = tmp_path / "found.json"
    words = ("--corpora", "web", "--sequences", 2, "--length", 40, "--out", out)
    done = call("check", pair[0], "--against", pair[1], *words)
    written = json.loads(out.read_text())
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == [finding["status"] for finding in written["findings"]]
    assert {"tensors", "perplexity, web", "loops", "JSON replies"} <= {finding["name"] for finding in written["findings"]}
    assert not (pair[0] / "check.json").exists()


def test_a_broken_folder_is_no_success_and_is_not_run(pair, call, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in pair[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": 3}))
    done = call("check", folder, "--against", pair[1])
    assert done.returncode == 2 and "not fit to be published: see tensors" in done.stderr
    assert "Not measured" in done.stdout and (folder / "check.json").is_file()


def test_a_corpus_that_cannot_be_read_is_a_finding(pair):
    found = check_folder(*pair, corpora=["nowhere"])
    assert found[-1].name == "behaviour" and found[-1].status == "fail" and "nowhere" in found[-1].note
