"""Every MoE family behind transformers' experts interface: trace, mask, prune, skip, save and reload."""

import copy
import itertools
import json
import statistics

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM

import esparse
from esparse.files import checkout
from esparse.moe.layers import moe_layers
from esparse.moe.masking import masked_layer
from esparse.moe.routers import pruned_table
from esparse.pruning.plan import PruningPlan
from esparse.pruning.scores import available_scores
from esparse.pruning.search import search_layer
from esparse.tests.conftest import EXHAUSTIVE, apart, block_input, random_tokens
from esparse.tests.families import (
    CARRIED,
    COMPOSITES,
    FAMILIES,
    NEWER,
    SAMPLE,
    family_config,
    family_model,
    router_kinds,
    smaller_row,
    stock_pruned,
)
from esparse.tracing.recorder import trace_block

KEPT = [0, 2, 3, 5, 6, 7]
GROUPED = {"n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"}
further = lambda name, sample: () if name in sample else EXHAUSTIVE  # noqa: E731
CASES = [pytest.param(name, {}, id=name, marks=further(name, SAMPLE)) for name in FAMILIES]
CASES += [
    pytest.param(name, GROUPED, id=f"{name}-groups", marks=further(name, ("deepseek_v2", "deepseek_v3")))  # of either score
    for name in ("deepseek_v2", "deepseek_v3", "glm4_moe", "beam")
]


def run(model, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, use_cache=False).logits


def output(layer, inputs: tuple) -> torch.Tensor:
    """What losses compare, from the stock block: its output, or its experts' sum where that does not leave linearly."""
    sums = []
    hook = layer.experts.register_forward_hook(lambda module, args, out: sums.append(out))
    result = layer.block(*inputs[0], **inputs[1])
    hook.remove()
    return (result[0] if isinstance(result, tuple) else result) if layer.output_is_linear else sums[0]


def block_inputs(layer, model, tokens: torch.Tensor) -> list[tuple]:
    seen = []
    hook = layer.block.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    run(model, tokens)
    hook.remove()
    return seen


def given_plan(model, trace, kept: list[int]) -> PruningPlan:
    count = len(moe_layers(model))
    return PruningPlan("given", len(kept), [kept] * count, [0.0] * count, trace.model, trace.tokens)


def check_recorded(model, small, plan: PruningPlan, tokens: torch.Tensor) -> None:
    """Router logits that transformers records under a mask are those of a stock model with the kept experts, whether or not
    they were asked for before."""
    if "router_logits" not in (type(model.base_model)._can_record_outputs or {}):
        return
    record = lambda any_model: any_model.base_model(tokens, use_cache=False, output_router_logits=True).router_logits  # noqa: E731
    expected, gone = record(small), [expert for expert in range(8) if expert not in KEPT]
    for _ in range(2):
        with esparse.masked(model, plan):
            masked = record(model)
        for mine, theirs in zip(masked, expected, strict=True):
            stay = [*KEPT, *range(8, mine.shape[-1])]  # a router may also give logits to what is no expert
            assert torch.allclose(mine[..., stay], theirs, rtol=0, atol=1e-4) and (mine[..., gone] == float("-inf")).all()
        assert all(logits.isfinite().all() for logits in record(model))  # now the recorder listens first


@pytest.mark.parametrize(("family", "changes"), CASES)
@torch.no_grad()
def test_family(family, changes, reloaded, tmp_path):
    model, tokens = family_model(family, **changes), random_tokens()
    before = run(model, tokens)
    trace = esparse.trace(model, tokens)
    assert torch.equal(run(model, tokens), before)

    small, layers = stock_pruned(model, KEPT), moe_layers(model)
    for number in (0, len(layers) - 1):
        calls = block_inputs(layers[number], model, tokens)
        change = torch.cat([output(moe_layers(small)[number], one) - output(layers[number], one) for one in calls])
        assert esparse.reconstruction_loss(trace.layers[number], KEPT) == pytest.approx(change.norm().item(), rel=1e-4)

    plan, expected = given_plan(model, trace, KEPT), run(small, tokens)
    assert (expected - before).abs().max() > 1e-3
    with esparse.masked(model, plan):
        assert apart(run(model, tokens), expected) < 1e-5
    check_recorded(model, small, plan, tokens)
    pruned = esparse.prune(copy.deepcopy(model), plan)
    assert apart(run(pruned, tokens), expected) < 1e-5

    pruned.save_pretrained(tmp_path / "pruned")
    assert apart(reloaded(tmp_path / "pruned"), expected) < 1e-5
    model.save_pretrained(tmp_path / "full")
    one, other = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("full", "pruned"))
    changed = {key: (one.get(key), other.get(key)) for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    assert changed and set(changed.values()) == {(8, 6)} and all("experts" in key for key in changed)


@pytest.mark.parametrize(("family", "changes"), CASES)
@torch.no_grad()
def test_family_skips(family, changes):
    model, tokens = family_model(family, **changes), random_tokens()
    before, first = run(model, tokens), moe_layers(model)[0]
    if first.k == 1:
        with pytest.raises(ValueError, match=r"Nothing can be skipped.*\(k = 1\)"):
            esparse.enable_skipping(model, [0.0] * len(moe_layers(model)))
        return
    with esparse.skipping(model, [0.0] * len(moe_layers(model))):
        assert apart(run(model, tokens), before) < 1e-5
    weights = []
    hook = first.gate.register_forward_hook(lambda gate, args, out: weights.append(out[1].sort(1, descending=True).values))
    run(model, tokens)
    hook.remove()
    heard = torch.cat(weights)
    ratios = sorted((heard[:, 1] / heard[:, 0]).tolist())  # k = 2: w_2 / w_1, from the stock gate
    betas = esparse.median_betas(esparse.trace(model, tokens))
    assert betas[0] == pytest.approx(statistics.median(ratios), rel=1e-6)
    with esparse.skipping(model, betas):
        shares = esparse.skipped_shares(model, tokens)
        assert not torch.equal(run(model, tokens), before)
    assert shares[0] == pytest.approx(sum(ratio < betas[0] for ratio in ratios) / len(ratios))


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_a_sparse_mixer_is_known_where_no_probed_token_has_a_near_tie(seed):
    """Both weights of a token are 1, unless a third expert is within 2% of the chosen one: the sum is no constant. The gate
    itself says what the weights are, on 4,096 other tokens."""
    gates = 0
    for layer in moe_layers(family_model("phimoe", n=4, seed=seed)):
        states = torch.randn(4096, layer.gate.weight.shape[1], generator=torch.Generator().manual_seed(seed))
        logits, weights, chosen = layer.gate(states)[:3]
        assert not layer.router.normalises and not torch.equal(weights, torch.ones_like(weights))
        assert torch.equal(layer.router.weights(logits, chosen), weights)
        gates += 1
    assert gates > 1


def test_the_sample_has_every_kind_of_router():
    known = [name for name in FAMILIES if Version(transformers.__version__) >= Version(NEWER.get(name, "5.17"))]
    kinds = {name: router_kinds(family_model(name)) for name in known}
    assert set().union(*kinds.values()) == set().union(*(kinds[name] for name in SAMPLE if name in known))


def test_a_table_that_is_not_filled_is_refused():
    with pytest.raises(ValueError, match=r"layers\.0\.mlp: .* sends token ids to one expert twice: the table is not filled"):
        esparse.trace(AutoModelForCausalLM.from_config(family_config("deepseek_v4")).eval(), random_tokens())


def test_a_router_that_asks_for_more_than_is_known_is_refused():
    model = family_model("mixtral")
    gate = moe_layers(model)[0].gate
    gate.forward = lambda hidden_states, mood, forward=gate.forward: forward(hidden_states)
    with pytest.raises(ValueError, match=r"MixtralTopKRouter, since it chooses by 'mood' as well"):
        esparse.trace(model, random_tokens())


@torch.no_grad()
def test_a_table_that_lost_experts_gives_the_others_the_tokens():
    layer = moe_layers(family_model("deepseek_v4", n=64))[0]
    table = pruned_table(layer.gate.tid2eid, kept := list(range(0, 64, 2)), 64)
    assert table.tolist() == [smaller_row(row, kept, 64) for row in layer.gate.tid2eid.tolist()]
    assert len(table.unique()) > 24  # 60 ids, two experts each, over 32 that stay: none takes all that were left over


@torch.no_grad()
def test_choosing_no_expert_stays_a_choice():
    model = family_model("zaya")
    trace = esparse.trace(model, random_tokens())
    shares = [(layer.order[:, 0] == layer.n).double().mean().item() for layer in trace.layers]
    assert any(0 < share < 1 for share in shares)
    assert [esparse.selection_frequency(layer).sum().item() for layer in trace.layers] == pytest.approx([1 - s for s in shares])


@pytest.mark.parametrize("family", ["deepseek_v4", "inkling_text", "zaya"])
def test_every_search_finds_what_trying_all_finds(family):
    trace = esparse.trace(family_model(family), random_tokens())
    layer = trace.layers[-1]
    losses = {subset: esparse.reconstruction_loss(layer, subset) for subset in itertools.combinations(range(8), 6)}
    kept, loss, _ = search_layer(layer, 6, "enumerate")
    assert losses[tuple(kept)] == pytest.approx(min(losses.values()), rel=1e-5) and loss == pytest.approx(losses[tuple(kept)])
    for method in ("greedy", *available_scores(trace), "random"):
        kept, loss, _ = search_layer(layer, 6, method)
        assert loss == pytest.approx(losses[tuple(kept)], rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["inkling2_text"])
def test_what_a_walk_cannot_carry_is_refused(family):
    model, tokens = family_model(family), random_tokens()
    with pytest.raises(ValueError, match="DecoderLayer also takes hidden states of earlier layers"):
        esparse.search_experts(esparse.trace(model, tokens), 6, method="progressive", model=model, tokens=tokens)


@pytest.mark.parametrize("family", ["deepseek_v4", "inkling_text", "zaya", "glm_moe_dsa", "hy_v4"])
@torch.no_grad()
def test_a_progressive_loss_is_that_of_the_pruned_block_on_the_pruned_stream(family):
    model, tokens = family_model(family), random_tokens()
    options = {"method": "progressive", "loss": "eq3", "model": model, "tokens": tokens}
    plan = esparse.search_experts(esparse.trace(model, tokens), 6, **options)
    small = esparse.prune(copy.deepcopy(model), plan)
    ends = [(moe_layers(one)[-1], one) for one in (small, model)]
    found, wanted = (output(layer, block_inputs(layer, one, tokens)[0]) for layer, one in ends)
    assert plan.losses[-1] == pytest.approx((found - wanted).norm().item(), rel=1e-4)


@torch.no_grad()
def test_groups_keep_equally_many():
    model = family_model("deepseek_v3", **GROUPED)
    trace = esparse.trace(model, random_tokens(), keep=4)
    with pytest.raises(ValueError, match="as many experts in each of the router's 2 groups"):
        esparse.reconstruction_loss(trace.layers[0], [0, 1, 2, 3, 4, 5])
    with pytest.raises(ValueError, match="groups must keep equally many"):
        esparse.search_experts(trace, 5)
    for method in ("enumerate", "greedy", *available_scores(trace), "random"):
        for kept in esparse.search_experts(trace, 6, method=method).kept:
            assert sum(e < 4 for e in kept) == 3


@pytest.mark.parametrize("top", [1, 2])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "glm4_moe"])
@torch.no_grad()
def test_a_token_reaches_few_experts_whichever_two_each_group_loses(family, top):
    """Beside these, three of its best group and of each group that it leaves out."""
    model, tokens = family_model(family, 32, 3, **GROUPED | {"n_group": 4, "topk_group": top}), random_tokens()
    layer, traced = moe_layers(model)[-1], esparse.trace(model, tokens, keep=24).layers[-1]
    assert traced.router.groups == 4 and traced.order.shape[1] == 8 + 3 * (5 - top)
    (call,), generator = block_inputs(layer, model, tokens), torch.Generator().manual_seed(0)
    before = output(layer, call)
    for _ in range(8):
        kept = [8 * group + e for group in range(4) for e in sorted(torch.randperm(8, generator=generator)[:6].tolist())]
        with masked_layer(layer, kept):
            change = output(layer, call) - before
        assert esparse.reconstruction_loss(traced, kept) == pytest.approx(change.norm().item(), rel=1e-4)


def families_table() -> str:
    """The table in FAMILIES.md: what this file, the streaming tests and, of composite checkpoints, `test_layouts` check."""
    rows = ["| model type | a published checkpoint | from disk by layers |", "|---|---|---|"]
    inside = {checkpoint: f", inside `{name}`" for name, (checkpoint, _, _) in COMPOSITES.items()}
    disk = lambda name: "no" if name in CARRIED else f"yes{inside.get(FAMILIES[name], '')}"  # noqa: E731
    rows += [f"| `{name}` | {checkpoint} | {disk(name)} |" for name, checkpoint in FAMILIES.items()]
    return "\n".join(rows)


def composites_table() -> str:
    """The table in FAMILIES.md of composite checkpoints that `test_layouts` checks."""
    rows = ["| composite model type | a published checkpoint | text model inside |", "|---|---|---|"]
    return "\n".join(rows + [f"| `{name}` | {checkpoint} | `{text}` |" for name, (checkpoint, text, _) in COMPOSITES.items()])


def test_the_pages_list_exactly_the_families_that_are_tested():
    page = (checkout() / "esparse" / "FAMILIES.md").read_text()
    assert composites_table() in page and f"and {len(COMPOSITES)} composite ones" in page
    assert families_table() in page
    assert f"{len(FAMILIES)} model types</summary>" in page
    assert f"| {len(FAMILIES)} model types, found" in (checkout() / "esparse" / "COMPARISON.md").read_text()
    counts = f"[{len(FAMILIES)} model types and {len(COMPOSITES)} composite ones](esparse/FAMILIES.md)"
    assert counts in (checkout() / "README.md").read_text()
    assert f"5.17, {len(FAMILIES) - len(NEWER)} of the {len(FAMILIES)} pass the same tests" in page
    for since, words in (("5.23", "need a newer one (5.23 was used here)"), ("5.24", "came with 5.24")):
        *names, last = (f"`{name}`" for name, version in NEWER.items() if version == since)
        assert f"{', '.join(names)} and {last} {words}" in page


@pytest.mark.parametrize("family", ["granitemoe", "olmoe", "mixtral"])
def test_in_half_precision_as_on_a_t4(family):
    """float16 weights, a float32 Gram: the losses and choices of the same weights in float32."""
    half, tokens = family_model(family).half(), random_tokens()
    single = copy.deepcopy(half).float()
    traces = [esparse.trace(model, tokens, keep=6) for model in (half, single)]
    assert all(layer.gram.dtype == torch.float32 for layer in traces[0].layers)
    for number, pair in enumerate(zip(moe_layers(half), moe_layers(single), strict=True)):
        x = block_input(half, number, tokens).flatten(0, 1)  # else one token's choice would reach later layers
        mine, expected = (trace_block(layer, some, 6) for layer, some in zip(pair, (x, x.float()), strict=True))
        same = (mine.order == expected.order)[:, :2].all(1)
        best = expected.logits.sort(1, descending=True).values[~same, :3]
        assert (-best.diff(dim=1)).amin(1).lt(2**-8 * expected.logits.abs().max()).all() and same.float().mean() > 0.9
        torch.testing.assert_close(mine.weights.float()[same], expected.weights[same], atol=2e-3, rtol=2e-2)
    plans = [esparse.search_experts(one, 6) for one in traces]
    assert plans[0].kept == plans[1].kept
    assert plans[0].losses == pytest.approx(plans[1].losses, rel=5e-3)
    betas = [1.5 * beta for beta in esparse.median_betas(traces[1])]
    skipped = []
    for model in (half, single):
        with torch.no_grad(), esparse.skipping(model, betas):
            skipped.append(run(model, tokens).float())
    assert (skipped[0] - skipped[1]).abs().median() < 2e-3 * skipped[1].abs().max()  # a pair at the edge may fall otherwise
    with torch.no_grad(), esparse.masked(half, plans[0]):
        expected = run(half, tokens)
    with torch.no_grad():
        assert apart(run(esparse.prune(half, plans[0]), tokens), expected) < 2**-8 and expected.dtype == torch.float16


def test_an_overflow_in_half_precision_is_one_sentence():
    model = family_model("olmoe").half()
    with torch.no_grad():
        moe_layers(model)[1].experts.down_proj.mul_(60000)
    with pytest.raises(ValueError, match=r"layers\.1.*expert outputs are not finite; the model or its dtype overflows"):
        esparse.trace(model, random_tokens())
