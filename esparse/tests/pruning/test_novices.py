"""Mean outputs and constants in place of removed experts are those of a plain loop over tokens; super experts stay."""

import itertools

import pytest
import torch

import esparse
from esparse.moe.layers import moe_layers
from esparse.pruning.scores import super_experts
from esparse.tests.conftest import apart, block_input, random_model, random_tokens
from esparse.tests.families import family_model
from esparse.tracing.losses import weighed

TOKENS = random_tokens()


def plain(layer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each token's routing weights and experts [tokens, 2], and those experts' outputs [tokens, 2, d]."""
    _, weights, chosen = layer.gate(x)
    outputs = torch.stack([layer.experts(x, chosen[:, i, None], torch.ones(len(x), 1, dtype=x.dtype)) for i in (0, 1)], 1)
    return weights, chosen, outputs


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
@torch.no_grad()
def test_a_removed_expert_returns_its_mean_output(family):
    model = random_model(family, 5, 2)
    trace = esparse.trace(model, TOKENS)
    means = esparse.mean_outputs(model, TOKENS, batch_size=3)
    weights, chosen, outputs = plain(moe_layers(model)[0], block_input(model, 0, TOKENS).flatten(0, 1))
    expected = torch.stack([outputs[chosen == expert].mean(0) for expert in range(5)])
    assert apart(means[0], expected) < 1e-9

    plan = esparse.search_experts(trace, 3, method="frequency")
    removed = torch.tensor([expert not in plan.kept[0] for expert in range(5)])
    replaced = torch.where(removed[chosen][:, :, None], expected[chosen], outputs)
    seen = []
    hook = moe_layers(model)[0].block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with esparse.novices(model, plan, means):
        model(TOKENS)
    hook.remove()
    assert apart(seen[0].flatten(0, 1), (weights[:, :, None] * replaced).sum(1)) < 1e-6  # Mixtral's weights are float32
    full = model(TOKENS).logits
    with esparse.novices(model, esparse.search_experts(trace, 5), means):
        assert apart(model(TOKENS).logits, full) < 1e-6


def test_constants_of_another_model_are_refused():
    plan = esparse.search_experts(esparse.trace(random_model("mixtral", 5, 2, seed=1), TOKENS), 3)
    model = random_model("mixtral", 5, 2)
    with pytest.raises(ValueError, match="made with another model"), esparse.novices(model, plan, []):
        pass
    own, means = esparse.search_experts(esparse.trace(model, TOKENS), 3), esparse.mean_outputs(model, TOKENS)
    for constants in (means[:2], [mean[:3] for mean in means]):
        with pytest.raises(ValueError, match="a constant for each expert of each"), esparse.novices(model, own, constants):
            pass


@torch.no_grad()
def test_a_token_without_an_expert_counts_for_none():
    """ZAYA's gate returns some expert with weight 0 then; the router's logits say which tokens these are."""
    model, inputs = family_model("zaya"), []
    traced, means = esparse.trace(model, TOKENS), esparse.mean_outputs(model, TOKENS)
    layers = moe_layers(model)
    hooks = [layer.experts.register_forward_pre_hook(lambda _module, args: inputs.append(args[0])) for layer in layers]
    model(TOKENS, use_cache=False)
    for hook in hooks:
        hook.remove()
    assert any((layer.order[:, 0] == layer.n).any() for layer in traced.layers)
    for layer, x, trace, mean in zip(layers, inputs, traced.layers, means, strict=True):
        chosen = [x[trace.order[:, 0] == expert] for expert in range(layer.n)]
        one = [layer.experts(some, torch.full((len(some), 1), e), torch.ones(len(some), 1)) for e, some in enumerate(chosen)]
        assert apart(mean, torch.stack([output.sum(0) / max(1, len(output)) for output in one])) < 1e-5


@torch.no_grad()
def test_a_super_expert_stays_whatever_the_method():
    """One expert's output is made a hundred times as large for the few tokens that choose it."""
    model = random_model("mixtral", 5, 2)
    moe_layers(model)[1].experts.down_proj[4] *= 100
    trace = esparse.trace(model, TOKENS)
    protected = super_experts(trace)
    assert protected == [[], [4], []]
    with_loudest = [s for s in itertools.combinations(range(5), 3) if 4 in s]
    for method in ("enumerate", "frequency", "random"):
        plan = esparse.search_experts(trace, 3, method=method, protect=protected, seed=3)
        free = esparse.search_experts(trace, 3, method=method, seed=3)
        assert 4 in plan.kept[1] and [plan.kept[0], plan.kept[2]] == [free.kept[0], free.kept[2]]
    first = weighed(trace.layers[0], "residual")
    losses = {subset: esparse.reconstruction_loss(first, subset) for subset in with_loudest}
    plan = esparse.search_experts(trace, 3, protect=[[4], [], []])
    assert tuple(plan.kept[0]) == min(losses, key=losses.get)
    for method, found, message in (
        ("greedy", protected, "'greedy' cannot protect experts"),
        ("enumerate", [[0, 1, 2, 3], [], []], "3 experts cannot hold 4 protected ones"),
        ("enumerate", [[], [5], []], "protected experts must be numbers from 0 to 4, got \\[5\\]"),
        ("frequency", [[], [-1], []], "protected experts must be numbers from 0 to 4"),
        ("random", [[4]], "Got protected experts for 1 layers, but the trace has 3"),
    ):
        with pytest.raises(ValueError, match=message):
            esparse.search_experts(trace, 3, method=method, protect=found)


def test_each_group_holds_its_protected_experts_or_says_that_it_cannot():
    trace = esparse.trace(family_model("deepseek_v3", n_group=2, topk_group=1), TOKENS, keep=4)
    for method in ("enumerate", "frequency"):
        plan = esparse.search_experts(trace, 4, method=method, protect=[[0, 1], [2, 7]])
        assert plan.kept[0][:2] == [0, 1] and {2, 7} <= {*plan.kept[1]}
        with pytest.raises(ValueError, match="4 experts cannot hold 3 protected ones, since each of 2 groups keeps 2"):
            esparse.search_experts(trace, 4, method=method, protect=[[0, 1, 2], []])


@torch.no_grad()
def test_the_mean_change_is_folded_into_biases():
    model = family_model("gpt_oss")
    plan = esparse.search_experts(esparse.trace(model, TOKENS), moe_layers(model)[0].k + 1, method="random")
    x, layer = block_input(model, 0, TOKENS).flatten(0, 1)[None], moe_layers(model)[0]
    full = layer.block(x)[0][0]
    changes = esparse.mean_changes(model, plan, TOKENS, batch_size=3)
    pruned = esparse.prune(model, plan)
    before = moe_layers(pruned)[0].block(x)[0][0]
    assert apart(changes[0], (full - before).double().mean(0)) < 1e-5
    esparse.fold_changes(pruned, changes)
    after = moe_layers(pruned)[0].block(x)[0][0]
    assert apart(after - before, changes[0].expand_as(before)) < 1e-5
    assert (full - after).norm() < 0.99 * (full - before).norm()  # the mean is the best constant


def test_constants_without_a_place_are_refused():
    model = random_model("mixtral", 5, 2)
    with pytest.raises(ValueError, match="so it holds no constant"):
        esparse.fold_changes(model, [torch.zeros(8)] * len(moe_layers(model)))
    with pytest.raises(ValueError, match="Give a constant for each of the"):
        esparse.fold_changes(model, [])
