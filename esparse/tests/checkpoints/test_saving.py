"""Saved folders load in stock transformers, in a process that never imports esparse, and in esparse."""

import copy

import pytest
import torch
import transformers

import esparse
from esparse.pruning.skipping import skipping_betas
from esparse.tests.conftest import apart, random_model, random_tokens


@pytest.mark.parametrize("family", ["mixtral", "qwen3", "olmoe"])
def test_pruned_folder_loads_in_stock_transformers(family, tmp_path, tiny, reloaded):
    model, tokens = random_model(family, 8, 2, dtype=torch.float32), random_tokens()
    plan = esparse.search_experts(esparse.trace(model, tokens), 5)
    original = copy.deepcopy(model.config.to_dict())
    esparse.prune(model, plan)
    esparse.save_model(model, tiny[1], tmp_path / "pruned", plan)
    assert apart(reloaded(tmp_path / "pruned"), model(tokens).logits) < 1e-5
    saved = transformers.AutoConfig.from_pretrained(tmp_path / "pruned").to_dict()
    changed = {key for key in original if key in saved and saved[key] != original[key]}
    assert changed <= {"num_local_experts", "num_experts", "dtype", "architectures", "_name_or_path"} and 5 in (
        saved.get(key) for key in changed
    )
    assert esparse.PruningPlan.load(tmp_path / "pruned" / "plan.json") == plan
    assert "r = 5" in (tmp_path / "pruned" / "README.md").read_text()


def test_a_folder_saved_with_skipping_comes_back_skipping(tmp_path, tiny):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    betas = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    ids = tokenizer(["Ada keeps a goat."], return_tensors="pt").input_ids
    with esparse.skipping(model, betas):
        esparse.save_model(model, tokenizer, tmp_path / "skipping")
        expected = model(ids).logits
    again, _ = esparse.load_model(str(tmp_path / "skipping"))
    assert skipping_betas(again) == betas
    assert apart(again(ids).logits, expected) < 1e-5
    assert "_experts_implementation" not in (tmp_path / "skipping" / "config.json").read_text()


def test_trace_comes_back_the_same(tmp_path):
    model = random_model("qwen3", 8, 2)
    traced = esparse.trace(model, random_tokens())
    traced.layers[0].weights  # noqa: B018 (a cached property, which must not be written)
    traced.save(tmp_path / "trace")
    again = esparse.Trace.load(tmp_path / "trace")
    assert (again.model, again.tokens, again.keep) == (traced.model, traced.tokens, traced.keep)
    for one, other in zip(traced.layers, again.layers, strict=True):
        assert (one.name, one.k, one.router) == (other.name, other.k, other.router)
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("logits", "order", "gram"))
    assert esparse.search_experts(again, 6) == esparse.search_experts(traced, 6)


def test_plan_comes_back_the_same(tmp_path, tiny_trace):
    plan = esparse.search_experts(tiny_trace, 6)
    plan.save(tmp_path / "plan.json")
    assert esparse.PruningPlan.load(tmp_path / "plan.json") == plan


def test_nothing_is_half_written(tmp_path, tiny, monkeypatch):
    model = copy.deepcopy(tiny[0])

    def fail(*_args, **_options):
        raise OSError("No space left on device")

    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space"):
        esparse.save_model(model, tiny[1], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
