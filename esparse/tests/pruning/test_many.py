"""Many experts: greedy search against enumeration, scores against their definitions, and refused input."""

import itertools
import math

import pytest
import torch

import esparse
from esparse.measure import search_cost
from esparse.moe.layers import decoder_layers, flat_output, moe_layers
from esparse.pruning import search
from esparse.pruning.scores import EXPERT_SCORES, available_scores
from esparse.tests.conftest import EXHAUSTIVE, apart, block_input, random_model, random_tokens
from esparse.tests.families import family_model
from esparse.tracing import recorder
from esparse.tracing.removals import Removals

FAMILIES = ("mixtral", "olmoe", "deepseek_v3", "dots1", "gpt_oss", "kolibri1", "lfm2_moe", "hy_v3")


@pytest.mark.parametrize("layers", [40, pytest.param(200, marks=EXHAUSTIVE)])
@pytest.mark.slow
def test_greedy_finds_the_optimum_in_at_least_95_of_100_layers(layers):
    found = search_cost.hits(search_cost.random_cases(layers))
    assert found["layers"] == layers and found["optimal"] >= 0.95 * layers, found


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_removals_and_swaps_would_cost_is_what_they_cost(family):
    """Kept up to date step by step, against the loss of each subset from the trace, which other tests check."""
    layer = esparse.trace(family_model(family), random_tokens(), keep=4).layers[0]
    state = Removals(layer)
    squared = lambda kept: esparse.reconstruction_loss(layer, kept) ** 2  # noqa: E731
    for out in (3, 5):
        kept, costs = state.kept.nonzero()[:, 0].tolist(), state.costs()
        for expert in kept:
            assert costs[expert].item() == pytest.approx(squared([e for e in kept if e != expert]), rel=1e-5)
        state.change(out)
    kept = state.kept.nonzero()[:, 0].tolist()
    for back in (3, 5):
        costs = state.swap_costs(back)
        for expert in kept:
            assert costs[expert].item() == pytest.approx(squared([e for e in kept if e != expert] + [back]), rel=1e-5)
        assert torch.isinf(costs[[3, 5]]).all()
    state.change(3)
    state.change(0)
    assert state.loss() == pytest.approx(squared([1, 2, 3, 4, 6, 7]), rel=1e-5)


@pytest.mark.parametrize("family", ["ernie4_5_moe", "phimoe", "gemma4_text", *FAMILIES])
def test_greedy_against_all_subsets_for_every_kind_of_router(family):
    layer = esparse.trace(family_model(family), random_tokens(), keep=4).layers[0]
    for r in (6, 4):
        found, (_, losses) = search.search_layer(layer, r, "greedy"), esparse.subset_losses(layer, r)
        assert losses.min().item() * (1 - 1e-6) <= found[1] <= losses.min().item() * 1.01


@pytest.mark.parametrize("keep", [None, 8])
@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
@torch.no_grad()
def test_scores_are_their_definitions(family, keep):
    """Sums and means over the tokens routed to an expert, in plain Python from the experts' own outputs."""
    model, tokens, stream = random_model(family, 8, 2), random_tokens(), []
    decoder = decoder_layers(model)[0]
    with (
        decoder.post_attention_layernorm.register_forward_pre_hook(lambda _module, inputs: stream.append(inputs[0])),
        decoder.register_forward_hook(lambda _module, _inputs, output: stream.append(flat_output(output))),
    ):
        traced = esparse.trace(model, tokens, keep=keep).layers[0]
    turned = 1 - torch.nn.functional.cosine_similarity(stream[0].flatten(0, 1), stream[1], dim=1)
    layer, x = moe_layers(model)[0], block_input(model, 0, tokens).flatten(0, 1)
    _, weights, chosen = layer.gate(x)
    sums = {kind: [0.0] * 8 for kind in ("reap", "activation", "contribution", "easy-ep", "cosine")}
    counts, whole = [0] * 8, layer.block(x[None])[0]
    for token, place in itertools.product(range(len(x)), range(2)):
        expert = chosen[token, place].item()
        out = layer.experts(x[token : token + 1], chosen[token : token + 1, place, None], torch.ones(1, 1, dtype=x.dtype))
        counts[expert] += 1
        sums["activation"][expert] += out.norm().item()
        for kind, factor in (("reap", 1.0), ("contribution", 1.0), ("easy-ep", turned[token].item())):
            sums[kind][expert] += weights[token, place].item() * out.norm().item() * factor
        without = whole[token] - weights[token, place] * out[0]
        sums["cosine"][expert] += 1 - torch.nn.functional.cosine_similarity(whole[token], without, dim=0).item()
    assert {*sums, "frequency"} == EXPERT_SCORES.keys()
    for kind, total in sums.items():
        mean = kind in ("reap", "activation")
        expected = [a / max(1, count) if mean else a for a, count in zip(total, counts, strict=True)]
        assert esparse.expert_scores(traced, kind).tolist() == pytest.approx(expected, rel=1e-9)
        best = sorted(sorted(range(8), key=lambda e: -expected[e])[:5])
        assert search.search_layer(traced, 5, kind)[0] == best
    assert (esparse.expert_scores(traced, "frequency") * len(x)).tolist() == pytest.approx(counts)


@pytest.mark.parametrize("family", [*FAMILIES, "ernie4_5_moe", "phimoe", "deepseek_v4", "inkling_text", "zaya", "groups"])
@torch.no_grad()
def test_scores_need_the_chosen_experts_alone(family):
    """Such a trace scores, chooses, and tells frequencies and betas as one that reaches further; losses it leaves open."""
    model = family_model("deepseek_v3", n_group=2, topk_group=1) if family == "groups" else family_model(family)
    tokens, r = random_tokens(), 4
    near, far, k = esparse.trace(model, tokens, keep=8), esparse.trace(model, tokens, keep=r), moe_layers(model)[0].k
    for method in (*available_scores(far), "random"):
        plan, expected = (esparse.search_experts(traced, r, method=method) for traced in (near, far))
        assert plan.kept == expected.kept and set(plan.losses) == {None} and None not in expected.losses
        if method != "random":
            one, other = (esparse.expert_scores(traced.layers[0], method) for traced in (near, far))
            assert torch.allclose(one, other, rtol=1e-6)
    assert k == 1 or esparse.median_betas(near, plan.kept) == esparse.median_betas(far, plan.kept)
    for one, other, kept in zip(near.layers, far.layers, plan.kept, strict=True):
        assert one.order.shape[1] == k + (one.router.extra_logits > 0)
        assert torch.equal(esparse.selection_frequency(one, kept), esparse.selection_frequency(other, kept))
    for method in ("enumerate", "greedy"):
        with pytest.raises(ValueError, match="answers down to 8 experts, not 4: trace again with keep=4"):
            esparse.search_experts(near, r, method=method)


@pytest.mark.parametrize("method", [*EXPERT_SCORES, "random"])
def test_scores_from_disk_are_those_in_memory(method, tmp_path):
    """No expert runs on a token that is not routed to it, and the folder skips by the betas of the pruned model."""
    model, tokens = random_model("mixtral", 8, 2), random_tokens()
    model.save_pretrained(tmp_path / "model")
    traced, trace = (
        esparse.trace(model, tokens),
        esparse.trace_checkpoint(tmp_path / "model", tokens, tmp_path / "trace", keep=8),
    )
    for one, other in zip(trace.layers, traced.layers, strict=True) if method != "random" else ():
        assert apart(esparse.expert_scores(one, method), esparse.expert_scores(other, method)) < 1e-9
    report = esparse.prune_checkpoint(tmp_path / "model", tmp_path / "pruned", 5, calibration=tokens, method=method, skip=True)
    plan = esparse.PruningPlan.load(tmp_path / "pruned" / "plan.json")
    assert method == "random" or plan.kept == esparse.search_experts(traced, 5, method=method).kept
    assert plan.losses == [layer["loss"] for layer in report["layers"]] == [None] * 3
    assert [layer["beta_pruned"] for layer in report["layers"]] == esparse.median_betas(traced, plan.kept)


def test_a_score_or_method_that_nobody_knows_is_refused():
    layer = esparse.trace(random_model("mixtral", 8, 2), random_tokens()).layers[0]
    with pytest.raises(ValueError, match="Unknown score 'loudest': choose from frequency, reap, activation"):
        esparse.expert_scores(layer, "loudest")
    with pytest.raises(ValueError, match="Unknown method 'loudest': choose from enumerate, greedy, frequency"):
        search.search_layer(layer, 6, "loudest")


def test_an_expert_nobody_chooses_scores_nothing_and_goes_first():
    model = random_model("mixtral", 8, 2)
    moe_layers(model)[0].gate.weight.data[3] = -100 * moe_layers(model)[0].gate.weight.data.mean(0)
    trace = esparse.trace(model, random_tokens())
    unused = (esparse.selection_frequency(trace.layers[0]) == 0).nonzero()[:, 0].tolist()
    for expert, kind in itertools.product(unused, EXPERT_SCORES):
        assert esparse.expert_scores(trace.layers[0], kind)[expert] == 0
        assert expert not in search.search_layer(trace.layers[0], 8 - len(unused), kind)[0]


def test_enumeration_refuses_what_it_cannot_finish_and_names_greedy(monkeypatch):
    layer = search_cost.expert_layer(24, 2, hidden=32, inner=16)
    traced = recorder.trace_block(layer, torch.randn(64, 32, generator=torch.Generator().manual_seed(0)), 12)
    with pytest.raises(ValueError, match=r"2.7e\+06 subsets of 12 out of 24 experts .* use method='greedy'"):
        search.search_layer(traced, 12, "enumerate")
    monkeypatch.setattr(search, "MAX_ROUTINGS", 1000)
    with pytest.raises(ValueError, match="on 64 tokens are too many to enumerate"):
        search.search_layer(traced, 23, "enumerate")
    assert math.isfinite(search.search_layer(traced, 12, "greedy")[1])


def test_shipped_figures_hold_what_the_readme_claims():
    shipped = esparse.measured("many_experts")
    big = next(row for row in shipped["synthetic"] if row["n"] == 128 and row["twins"])
    assert big["r"] == 96 and big["k"] == 8 and big["tokens"] == 16384 and big["hidden"] == 256
    assert big["seconds"]["search"] < big["seconds"]["experts"]
    losses = {method: found["losses"][0] for method, found in big["methods"].items()}
    assert losses.pop("greedy") <= 0.9 * min(losses.values())
    assert sum(found["layers"] for found in shipped["optimum"].values()) == 200
    for row in shipped["trained"]:
        if "enumerate" in row["methods"]:
            for found in row["methods"].values():
                pairs = zip(row["methods"]["enumerate"]["losses"], found["losses"], strict=True)
                assert all(least <= loss * (1 + 1e-9) for least, loss in pairs)


def test_a_gram_that_does_not_fit_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr(recorder, "free_memory", lambda _device: 1000.0)
    with pytest.raises(ValueError, match=r"The Gram of 3 layers and 80 tokens would take .* GB .* fewer sequences"):
        esparse.trace(random_model("mixtral", 8, 2), random_tokens())
