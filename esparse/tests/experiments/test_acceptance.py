"""The acceptance report on stand-ins, and runs on models larger than memory or partly offloaded to disk."""

import math

import pytest
import torch
import transformers

import esparse
from esparse.__main__ import main
from esparse.checkpoints import models
from esparse.experiments import acceptance
from esparse.experiments import run as runs
from esparse.moe.identity import fingerprint
from esparse.tests.conftest import SHAPE, apart, random_tokens
from esparse.tests.families import family_model


def as_printed() -> tuple[dict, dict, dict]:
    same = {layer: list(range(6)) for layer in (2, 4, 16, 31)}
    one = [same.get(layer, [0, 1, 2, 3, 4, 6]) for layer in range(32)]
    other = [same.get(layer, [0, 1, 2, 3, 4, 7]) for layer in range(32)]
    return esparse.paper("betas"), {"C4": one, "MATH": other}, {8: 89079, 6: 67574, 4: 46069}


def test_the_papers_own_numbers_pass_and_others_do_not():
    betas, kept, sizes = as_printed()
    rows = [*acceptance.compare_betas(betas), acceptance.compare_layers(kept), *acceptance.compare_memory(sizes)]
    assert len(rows) == 6 and all(row["as printed"] for row in rows)
    wrong = {corpus: [values[0] + 0.1, *values[1:]] for corpus, values in betas.items()}
    assert acceptance.compare_betas(wrong)[0]["here"].startswith("31 of 32 within 0.02")
    assert not any(row["as printed"] for row in acceptance.compare_betas(wrong))
    kept["MATH"][0] = kept["C4"][0]
    assert acceptance.compare_layers(kept)["here"] == "layers [0, 2, 4, 16, 31]"
    assert not any(row["as printed"] for row in acceptance.compare_memory({r: size * 1.1 for r, size in sizes.items()}))
    with pytest.raises(ValueError, match="32 betas for C4, got 6"):
        acceptance.compare_betas({"C4": [0.5] * 6})


@pytest.mark.parametrize(("r", "expected"), [(8, 89079), (6, 67574), (4, 46069)])
def test_the_weights_of_mixtral_by_arithmetic(r, expected):
    assert acceptance.weights_mib(transformers.MixtralConfig(vocab_size=32000), r) == pytest.approx(expected, rel=1e-3)


def tiny_mixtral(folder, tokenizer, layers: int):
    """A folder with a tiny Mixtral of random weights and the embedded tokenizer."""
    torch.manual_seed(0)
    shape = {**SHAPE, "vocab_size": 1024, "num_hidden_layers": layers, "num_local_experts": 8, "num_experts_per_tok": 2}
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_report_from_end_to_end_on_a_stand_in(tiny, tmp_path, capsys):
    stand_in = tiny_mixtral(tmp_path / "mixtral", tiny[1], layers=32)  # as deep as the real one
    settings = ["GENERAL=web", "DOMAIN=arithmetic", "SEQUENCES=4", "LENGTH=32"]
    words = [word for setting in settings for word in ("--set", setting)]
    assert main(["acceptance", str(stand_in), "--run-dir", str(tmp_path), *words]) == 0
    said = capsys.readouterr().out
    run = esparse.Run(str(stand_in), general="web", domain="arithmetic", keep=[6], sequences=4, length=32, folder=tmp_path)
    for corpus, name in (("web", "C4"), ("arithmetic", "MATH")):
        betas = esparse.median_betas(esparse.trace(run.model, run.tokens(corpus)))
        close = sum(abs(a - b) <= 0.02 for a, b in zip(betas, esparse.paper("betas")[name], strict=True))
        assert f"{close} of 32 within 0.02" in said
    size = sum(p.numel() for p in run.model.parameters()) * 2 / 2**20
    assert f"{size:,.0f} MiB of weights" in said and "memory at r = 4" in said


def test_a_model_larger_than_memory_is_traced_from_disk_with_the_same_numbers(tiny, tmp_path, monkeypatch):
    stand_in = tiny_mixtral(tmp_path / "mixtral", tiny[1], layers=4)
    options = {"general": "web", "domain": "arithmetic", "keep": [6], "sequences": 4, "length": 32}
    whole = esparse.Run(str(stand_in), **options, folder=tmp_path / "whole")
    assert not whole.streamed
    expected = {corpus: whole.trace(corpus) for corpus in ("web", "arithmetic")}
    monkeypatch.setattr(models, "free_memory", lambda device: 1000)
    streamed = esparse.Run(str(stand_in), **options, folder=tmp_path / "streamed")
    assert streamed.streamed and streamed.sizes == whole.sizes
    monkeypatch.setattr(runs, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    assert streamed.plan("web", 6).kept == esparse.search_experts(expected["web"], 6).kept
    for corpus, other in expected.items():
        one = streamed.trace(corpus)
        assert one.model == other.model and one.tokens == other.tokens
        assert all(torch.equal(a.order, b.order) for a, b in zip(one.layers, other.layers, strict=True))
    assert "a local folder" in streamed.preflight()["access"]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"])
@torch.no_grad()
def test_a_model_that_lies_partly_on_the_disk_is_masked_and_skips_without_copies(family, tmp_path):
    model, tokens = family_model(family), random_tokens()
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    half = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
    ).eval()
    half.set_experts_implementation("eager")
    assert any(parameter.is_meta for parameter in half.parameters())
    assert fingerprint(half) == fingerprint(model)
    trace = esparse.trace(model, tokens)
    plan, betas = esparse.search_experts(trace, 6), esparse.median_betas(trace)
    for one in (esparse.trace(half, tokens).layers, trace.layers):
        assert all(math.isfinite(layer.gram.sum()) for layer in one)
    run = lambda any_model: any_model(tokens, use_cache=False).logits  # noqa: E731
    with esparse.masked(model, plan), esparse.skipping(model, betas):
        expected = run(model)
    with esparse.masked(half, plan), esparse.skipping(half, betas):
        assert apart(run(half), expected) < 1e-5
