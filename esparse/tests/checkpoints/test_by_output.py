"""The choice by the model's output: coordinate descent by whole forward passes, in memory, from disk and in any family."""

import itertools

import pytest
import torch

import esparse
from esparse.checkpoints.streaming import Streamed
from esparse.pruning import search
from esparse.pruning.candidates import in_turn, ranked_subsets
from esparse.pruning.scores import available_scores
from esparse.tests.conftest import random_model, random_tokens
from esparse.tests.families import composite_model, family_model
from esparse.tracing.losses import LOSSES, weighed

TOKENS = random_tokens()
OTHER = random_tokens(seed=5)


def plan_of(trace, kept) -> esparse.PruningPlan:
    return esparse.PruningPlan("", len(kept[0]), kept, [0.0] * len(kept), trace.model, trace.tokens)


@torch.no_grad()
def plain_kl(model, plan) -> float:
    """The mean KL from the definition, from two forward passes of the whole model in float64."""
    expected = model(OTHER).logits.double().log_softmax(-1)
    with esparse.masked(model, plan):
        found = model(OTHER).logits.double().log_softmax(-1)
    return (expected.exp() * (expected - found)).sum(-1).mean().item()


def single_plans(trace, r: int) -> dict:
    methods = ("enumerate", *available_scores(trace))
    keys = {f"{method}, {loss}": (method, loss) for method in methods for loss in LOSSES}
    return {label: esparse.search_experts(trace, r, method=method, loss=loss) for label, (method, loss) in keys.items()}


def plain_candidates(layer, r: int, singles: list, count: int) -> list:
    """Every method's own choice, then the second best subsets under each loss, the third best and so on."""
    found = []
    for kept in singles:
        found += [kept] if kept not in found else []
    orders = []
    for loss in LOSSES:
        subsets, losses = esparse.subset_losses(weighed(layer, loss), r)
        orders.append([list(subsets[i]) for i in losses.argsort().tolist()])
    for kept in itertools.chain(*zip(*orders, strict=True)):
        if len(found) < count and kept not in found:
            found.append(kept)
    return found


@pytest.mark.parametrize("count", [2, 8])
def test_the_plan_is_that_of_coordinate_descent_from_the_best_single_plan(count):
    model = random_model("mixtral", 5, 2)
    trace = esparse.trace(model, TOKENS, keep=3)
    singles = single_plans(trace, 3)
    kls = {label: plain_kl(model, plan) for label, plan in singles.items()}
    start = min(kls, key=kls.get)
    kept, tried = list(singles[start].kept), []
    for number, layer in enumerate(trace.layers):
        options = plain_candidates(layer, 3, [plan.kept[number] for plan in singles.values()], count)
        plans = [plan_of(trace, [*kept[:number], option, *kept[number + 1 :]]) for option in options]
        kept = min(plans, key=lambda plan: plain_kl(model, plan)).kept
        tried.append(len(options))
    plan, report = esparse.choose_by_output(model, trace, 3, OTHER, candidates=count, batch_size=3)
    assert plan.kept == kept and (plan.method, plan.loss) == ("output", "eq3")
    assert max(tried) > 2 and kept != singles[start].kept  # the case is one where candidates matter
    assert report["single"] == pytest.approx(kls, rel=1e-5) and report["start"] == start
    assert report["before"] == report["single"][start] == min(report["single"].values())
    assert report["after"] == pytest.approx(plain_kl(model, plan), rel=1e-5) and report["after"] < report["before"]
    losses = [esparse.reconstruction_loss(*pair) for pair in zip(trace.layers, kept, strict=True)]
    assert plan.losses == pytest.approx(losses, rel=1e-9)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gemma4_text", "deepseek_v4", "zaya"])
def test_in_every_family_no_single_method_is_better_and_disk_and_memory_agree(family, tmp_path):
    """Shared experts, dense layers, a decoder layer that holds experts, several residual streams, a state beside them."""
    model = family_model(family)
    model.save_pretrained(tmp_path / "model")
    trace = esparse.trace(model, TOKENS, keep=6)
    plan, report = esparse.choose_by_output(model, trace, 6, OTHER)
    singles = {label: plain_kl(model, single) for label, single in single_plans(trace, 6).items()}
    assert report["single"] == pytest.approx(singles, rel=1e-3)  # differences of float32 log-probabilities
    assert report["after"] == pytest.approx(plain_kl(model, plan), rel=1e-3)
    assert plain_kl(model, plan) <= min(singles.values()) * (1 + 1e-3)
    walked = esparse.trace_checkpoint(tmp_path / "model", TOKENS, tmp_path / "trace", keep=6)
    from_disk, found = esparse.choose_by_output(tmp_path / "model", walked, 6, OTHER)
    assert from_disk.kept == plan.kept and found["start"] == report["start"]
    assert found["single"] == pytest.approx(report["single"], rel=1e-5)
    assert found["after"] == pytest.approx(report["after"], rel=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_from_disk_each_later_layer_is_read_once_for_each_layer_worked_on(tied, tmp_path, monkeypatch):
    model, reads, load = family_model("mixtral", tie_word_embeddings=tied), [], Streamed._load
    model.save_pretrained(tmp_path / "model")
    trace = esparse.trace_checkpoint(tmp_path / "model", TOKENS, tmp_path / "trace", keep=5)
    monkeypatch.setattr(Streamed, "_load", lambda self, number: reads.append(number) or load(self, number))
    plan, report = esparse.choose_by_output(str(tmp_path / "model"), trace, 5, OTHER, batch_size=2)
    rounds = [[0, 1, 2], [0, 1, 2], [0, 1, 2], [1, 2], [2]]  # identity, single plans, then layer by layer
    assert reads == [None, *itertools.chain(*rounds)]
    in_memory, expected = esparse.choose_by_output(model, trace, 5, OTHER, batch_size=2)
    assert plan == in_memory and report["after"] == pytest.approx(expected["after"], rel=1e-5)


def test_in_a_composite_checkpoint_the_text_model_is_judged(tmp_path):
    model = composite_model("internvl")
    model.save_pretrained(tmp_path / "model")
    trace = esparse.trace(model, TOKENS, keep=6)
    (plan, report), (other, found) = (
        esparse.choose_by_output(source, trace, 6, OTHER) for source in (model, tmp_path / "model")
    )
    assert plan.kept == other.kept and report["after"] == pytest.approx(found["after"], rel=1e-5)
    assert report["after"] == pytest.approx(plain_kl(model, plan), rel=1e-3)


def test_where_subsets_are_too_many_greedy_removal_stands_in(monkeypatch):
    model = random_model("mixtral", 6, 2)
    trace = esparse.trace(model, TOKENS, keep=4)
    monkeypatch.setattr(search, "MAX_SUBSETS", 14)  # of 15
    plan, report = esparse.choose_by_output(model, trace, 4, OTHER)
    methods = ("greedy", *available_scores(trace))
    assert set(report["single"]) == {f"{method}, {loss}" for method in methods for loss in LOSSES}
    for loss in LOSSES:
        greedy = esparse.search_experts(trace, 4, method="greedy", loss=loss)
        assert report["single"][f"greedy, {loss}"] == pytest.approx(plain_kl(model, greedy), rel=1e-5)
    assert plain_kl(model, plan) <= min(report["single"].values()) * (1 + 1e-5)


def test_all_layers_under_all_losses_are_enumerated_where_that_is_no_more_work_than_one_layer_may_be(monkeypatch):
    trace = esparse.trace(random_model("mixtral", 6, 2), TOKENS, keep=4)
    work = 15 * TOKENS.numel()  # subsets times tokens of a layer, each of which one search may enumerate
    monkeypatch.setattr(search, "has_choice_table", lambda _layer: False)  # without a table it counts
    for most, method in ((9 * work, "enumerate"), (9 * work - 1, "greedy")):  # three layers, three losses
        monkeypatch.setattr(search, "MAX_ROUTINGS", most)
        assert {label.split(", ")[0] for label in ranked_subsets(trace, 4, 1)[0]} == {method, *available_scores(trace)}
    assert esparse.search_experts(trace, 4).method == "enumerate"


def test_candidates_come_from_all_sources_in_turn():
    a, b, c, d, e = "abcde"
    sources = [[a, b, c], [b], [d, a, e]]
    assert in_turn(sources, 9) == [a, b, d, c, e]
    assert in_turn(sources, 4) == [a, b, d, c]
    assert in_turn(sources, 1) == [a, b, d]
    trace = esparse.trace(random_model("mixtral", 5, 2), TOKENS, keep=3)
    assert {len(found) for layer in ranked_subsets(trace, 3, 0) for found in layer.values()} == {1}


def test_what_does_not_belong_together_is_refused(tmp_path):
    model, other = family_model("mixtral"), family_model("mixtral", seed=1)
    model.save_pretrained(tmp_path / "model")
    trace, foreign = esparse.trace(model, TOKENS, keep=5), esparse.trace(other, TOKENS, keep=5)
    for source in (model, tmp_path / "model"):
        with pytest.raises(ValueError, match="made with another model: trace the model you want"):
            esparse.choose_by_output(source, foreign, 5, OTHER)
        with pytest.raises(ValueError, match="answers down to 5 experts, not 4: trace again with keep=4"):
            esparse.choose_by_output(source, trace, 4, OTHER)
        with pytest.raises(ValueError, match="Cannot keep 9 experts"):
            esparse.choose_by_output(source, trace, 9, OTHER)
        with pytest.raises(ValueError, match="Token id 60 is outside the vocabulary"):
            esparse.choose_by_output(source, trace, 5, OTHER.clamp(min=60))
    with pytest.raises(ValueError, match="A model in memory takes no dtype, device: these are options of a checkpoint"):
        esparse.choose_by_output(model, trace, 5, OTHER, dtype="bfloat16", device="cpu")


def test_a_text_model_without_an_output_layer_is_refused_from_disk(tmp_path):
    model = composite_model("qwen3_vl_moe")
    model.save_pretrained(tmp_path / "model")
    trace = esparse.trace(model, TOKENS, keep=6)
    with pytest.raises(ValueError, match="Qwen3VLMoeTextModel has no output layer of its own: load the whole model"):
        esparse.choose_by_output(tmp_path / "model", trace, 6, OTHER)
