"""How sure a choice is: every draw, margin and beginning made again from its sequences, by models that run on them anew."""

import itertools
import json

import numpy as np
import pytest
import torch

import esparse
from esparse.checkpoints import folder
from esparse.experiments import figures
from esparse.experiments.pruning import how_sure
from esparse.moe.layers import moe_layers
from esparse.moe.routers import Router
from esparse.pruning.certainty import layer_certainty, resampled
from esparse.tests.conftest import random_model, random_tokens
from esparse.tests.families import family_model
from esparse.tracing import recorder as recorders
from esparse.tracing.losses import mixed, weighed
from esparse.tracing.recorder import trace_block
from esparse.tracing.trace import LayerTrace, part
from esparse.tracing.walk import Walk

TOKENS = random_tokens(7, 12)
DRAWS = 12


def drawn_tokens(draw: int) -> torch.Tensor:
    """The sequences of one draw, as token ids."""
    counts = resampled(len(TOKENS), DRAWS, seed=3)[draw]
    return TOKENS[torch.arange(len(TOKENS)).repeat_interleave(counts.long())]


@pytest.mark.parametrize("method", ["enumerate", "greedy", "frequency", "reap"])
@pytest.mark.parametrize(("family", "loss", "dtype"), [("mixtral", "residual", torch.float32), ("olmoe", "eq3", torch.float64)])
def test_each_draw_and_each_beginning_is_a_search_on_a_trace_of_its_own(family, loss, dtype, method):
    """The model runs again on every draw's sequences, and on the first 1, 2, ... of the calibration set."""
    model = random_model(family, 6, 2, dtype=dtype)
    chosen = lambda tokens: esparse.search_experts(esparse.trace(model, tokens), 4, method=method, loss=loss).kept  # noqa: E731
    draws, beginnings = [chosen(drawn_tokens(draw)) for draw in range(DRAWS)], [chosen(TOKENS[:p]) for p in range(1, 8)]
    found = esparse.certainty(esparse.trace(model, TOKENS), 4, method=method, loss=loss, draws=DRAWS, seed=3)
    for number, entry in enumerate(found):
        kept = beginnings[-1][number]
        assert entry["kept"] == kept
        held = np.array([[expert in draw[number] for expert in range(6)] for draw in draws])
        assert entry["shares"] == pytest.approx(held.mean(0), rel=1e-12)
        assert entry["same"] == pytest.approx(np.mean([draw[number] == kept for draw in draws]), rel=1e-12)
        last_other = max((p for p in range(7) if beginnings[p][number] != kept), default=-1)
        assert entry["settled"] == last_other + 2
        assert (entry["margin"] is None) == (method != "enumerate")
    assert len({entry["settled"] for entry in found}) > 1 or min(entry["same"] for entry in found) < 1
    assert json.loads(json.dumps(found)) == found


def test_draws_count_with_the_losses_of_single_subsets():
    """Without `search_experts`: for each draw the losses of all subsets on its repeated tokens, one after the other."""
    layer = esparse.trace(random_model("qwen3", 6, 3), TOKENS).layers[1]
    best = []
    for counts in resampled(7, DRAWS, seed=0).long():
        repeated = torch.cat([torch.arange(12) + 12 * i for i, times in enumerate(counts) for _ in range(times)])
        losses = {
            kept: esparse.reconstruction_loss(part(layer, repeated), kept) for kept in itertools.combinations(range(6), 4)
        }
        best.append(min(losses, key=losses.get))
    found = layer_certainty(layer, 4, draws=DRAWS)
    assert found["shares"] == [sum(expert in kept for kept in best) / DRAWS for expert in range(6)]
    assert found["same"] == best.count(tuple(found["kept"])) / DRAWS


def test_a_draw_takes_sequences_as_often_as_a_multinomial_does():
    counts = resampled(5, 20_000, seed=0).numpy()
    assert (counts.sum(1) == 5).all() and np.array_equal(counts, resampled(5, 20_000, seed=0))
    expected = np.eye(5) - 1 / 5  # the covariance of 5 trials of probability 1/5
    assert counts.mean(0) == pytest.approx(np.ones(5), rel=0.03) and np.cov(counts.T) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("loss", ["eq3", "output"])
def test_the_margin_is_the_gap_over_its_spread_in_a_bootstrap(loss):
    layer = esparse.trace(random_model("mixtral", 6, 2), TOKENS).layers[2]
    squares = np.array(
        [
            [esparse.reconstruction_loss(weighed(sequence, loss), kept) ** 2 for kept in itertools.combinations(range(6), 4)]
            for sequence in (part(layer, slice(12 * i, 12 * i + 12)) for i in range(7))
        ]
    )
    best, second = squares.sum(0).argsort()[:2]
    gaps = squares[:, second] - squares[:, best]
    sums = np.random.default_rng(0).multinomial(7, [1 / 7] * 7, 100_000) @ gaps
    margin = layer_certainty(weighed(layer, loss), 4, draws=1)["margin"]
    assert margin == pytest.approx(gaps.sum() / sums.std(), rel=0.02)
    assert margin == pytest.approx(gaps.sum() / (np.sqrt(7) * gaps.std()), rel=1e-6)


def test_two_experts_that_nobody_chooses_have_no_margin():
    """Whichever of the two goes, nothing is lost; every draw removes the second, as the search does."""
    generator = torch.Generator().manual_seed(0)
    logits, outputs = torch.randn(24, 5, generator=generator), torch.randn(24, 5, 3, generator=generator)
    logits[:, [1, 4]] -= 20
    order, (i, j) = logits.argsort(1, descending=True), torch.triu_indices(5, 5)
    ranking = outputs.gather(1, order[..., None].expand(-1, -1, 3))
    gram = (ranking @ ranking.mT)[:, i, j]
    layer = LayerTrace("layer", 2, Router(renormalise=True), logits, order, gram, length=6)
    found = layer_certainty(layer, 4, draws=50)
    assert found == {"kept": [0, 1, 2, 3], "shares": [1, 1, 1, 1, 0], "same": 1.0, "margin": 0.0, "settled": 1}
    assert layer_certainty(layer, 5, draws=50)["margin"] is None


def test_a_mixture_of_sequences_of_two_lengths_is_refused():
    """80 and 48 tokens: a multiple of either length."""
    model = random_model("mixtral", 4, 2)
    layers = [esparse.trace(model, random_tokens(*shape)).layers[0] for shape in ((3, 16), (4, 20))]
    with pytest.raises(ValueError, match="does not consist of calibration sequences"):
        layer_certainty(mixed(layers, [0.5, 0.5]), 3)


def test_what_has_no_sequences_to_draw_is_refused():
    model = random_model("mixtral", 6, 2)
    trace = esparse.trace(model, TOKENS)
    layer = trace.layers[0]
    block = trace_block(moe_layers(model)[0], torch.randn(24, 32).double(), 4)
    for wrong in (block, part(layer, slice(0, 30))):
        with pytest.raises(ValueError, match="does not consist of calibration sequences"):
            layer_certainty(wrong, 4)
    with pytest.raises(ValueError, match="one sequence does not tell"):
        esparse.certainty(esparse.trace(model, TOKENS[:1]), 4)
    for method in ("random", "progressive"):
        with pytest.raises(ValueError, match=f"method='{method}' does not choose from the trace alone"):
            esparse.certainty(trace, 4, method=method)
    with pytest.raises(ValueError, match="at least one draw"):
        esparse.certainty(trace, 4, draws=0)
    with pytest.raises(ValueError, match="Cannot keep 1 experts"):
        esparse.certainty(trace, 1)
    layer.split = True
    with pytest.raises(ValueError, match="on one process alone"):
        esparse.certainty(trace, 4, method="greedy")


def test_a_saved_trace_and_one_from_disk_answer_alike(tmp_path):
    model = family_model("mixtral")
    model.save_pretrained(tmp_path / "source")
    trace = esparse.trace(model, TOKENS, keep=6)
    trace.save(tmp_path / "saved")
    streamed = esparse.trace_checkpoint(tmp_path / "source", TOKENS, tmp_path / "streamed", keep=6)
    expected = esparse.certainty(trace, 6)
    assert esparse.certainty(esparse.Trace.load(tmp_path / "saved"), 6) == expected
    report = esparse.prune_checkpoint(tmp_path / "source", tmp_path / "pruned", 6, calibration=TOKENS, batch_size=3)
    layers = zip(expected, esparse.certainty(streamed, 6), report["layers"], strict=True)
    for whole, disk, reported in layers:
        assert all(disk[key] == whole[key] for key in ("kept", "shares", "same", "settled"))
        assert disk["margin"] == pytest.approx(whole["margin"], rel=1e-3)
        sure = reported["certainty"]
        assert sure["shares"] == [whole["shares"][expert] for expert in reported["kept"]]
        assert sure["settled"] == whole["settled"] and sure["margin"] == pytest.approx(whole["margin"], rel=1e-3)


# --- a run from disk that stops calibrating a layer -----------------------------------------------------------------------

MANY = random_tokens(40, 12)


def rule(traced: LayerTrace, r: int) -> tuple[int, list[int]]:
    """The sequences used and the experts kept, by searches on the first 8, 16 and 32 of 40 sequences of a whole trace."""
    found = {s: esparse.pruning.search.best_subset(part(traced, slice(0, 12 * s)), r)[0] for s in (8, 16, 32, 40)}
    used = next((two for one, two in ((8, 16), (16, 32)) if found[one] == found[two]), 40)
    return used, found[used]


@torch.no_grad()
@pytest.mark.parametrize("method", ["enumerate", "progressive"])
def test_until_stable_chooses_as_on_the_beginning_and_runs_fewer_experts(method, tmp_path, monkeypatch):
    """Against a walk that records all sequences and searches parts of its traces: later layers must see the same states."""
    model = family_model("mixtral")
    model.save_pretrained(tmp_path / "source")
    walk, expected, losses = Walk(model, MANY, progressive=method == "progressive"), [], []
    for number in range(len(moe_layers(model))):
        traced = weighed(walk.trace_layer(number, 5), "residual")
        expected.append(rule(traced, 5))
        losses.append(esparse.reconstruction_loss(part(traced, slice(0, 12 * expected[-1][0])), expected[-1][1]))
        if method == "progressive":
            walk.follow(number, expected[-1][1])
    assert len({used for used, _ in expected}) > 1  # some layers stop earlier than others

    stock, recorded = recorders.pair_outputs, []
    monkeypatch.setattr(recorders, "pair_outputs", lambda *given: recorded.append(len(given[1])) or stock(*given))
    options = {"calibration": MANY, "method": method, "batch_size": 4}
    report = esparse.prune_checkpoint(tmp_path / "source", tmp_path / "pruned", 5, until_stable=True, **options)
    assert [(layer["sequences"], layer["kept"]) for layer in report["layers"]] == expected
    assert [layer["loss"] for layer in report["layers"]] == pytest.approx(losses, rel=1e-4)
    assert sum(recorded) == 12 * sum(used for used, _ in expected)
    esparse.prune_checkpoint(tmp_path / "source", tmp_path / "all", 5, **options)
    assert sum(recorded) - 12 * sum(used for used, _ in expected) == 12 * 40 * len(expected)


def test_the_command_can_stop_early_and_refuses_to_on_several_processes(tmp_path, call, monkeypatch):
    words = [
        "prune",
        "data/tiny",
        tmp_path / "pruned",
        "--experts",
        6,
        "--calibration",
        "web",
        "--sequences",
        24,
        "--length",
        32,
    ]
    assert call(*words, "--until-stable").returncode == 0
    report = json.loads((tmp_path / "pruned" / folder.REPORT).read_text())
    assert report["until_stable"] and 16 in {layer["sequences"] for layer in report["layers"]} <= {16, 24}
    monkeypatch.setattr("esparse.checkpoints.jobs.ranks", lambda: 2)
    with pytest.raises(ValueError, match="run it without torchrun"):
        esparse.prune_checkpoint("data/tiny", tmp_path / "other", 6, calibration="web", until_stable=True)


# --- the figure of notebook 03 --------------------------------------------------------------------------------------------


def test_the_figure_marks_the_experts_that_stay(tmp_path):
    run = esparse.Run(sequences=4, length=32, tasks=[], folder=tmp_path)
    data = how_sure(run, 6)
    axes = figures.draw("03_certainty", figures.rounded(data)).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        f"{i}: {layer['margin']:.1f}" for i, layer in enumerate(data["layers"])
    ]
    dots = {(int(x), int(y)) for x, y in axes.collections[1].get_offsets()}
    assert dots == {(e, i) for i, kept in enumerate(run.plan(run.general, 6).kept) for e in kept}
    coloured = np.asarray(axes.collections[0].get_array()).reshape(6, 8)
    assert coloured == pytest.approx(np.array([layer["shares"] for layer in data["layers"]]), rel=1e-3)
