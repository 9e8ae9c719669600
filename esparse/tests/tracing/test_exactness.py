"""The trace against the definition: every number is recomputed by running pruned blocks or in plain Python."""

import copy
import itertools
import statistics

import pytest
import torch

import esparse
from esparse.moe import experts
from esparse.moe.layers import moe_layers
from esparse.moe.masking import masked_layer
from esparse.pruning.search import SEARCH_METHODS, subset_losses
from esparse.tests.conftest import apart, assert_greedy, block_input, random_model, random_tokens, sampled
from esparse.tracing import losses, recorder, trace
from esparse.tracing.losses import losses_of
from esparse.tracing.walk import Walk

CASES = [
    (family, n, k, seed, 1)
    for family in ("mixtral", "qwen3", "olmoe")
    for n, k in ((4, 1), (4, 2), (4, 3), (8, 1), (8, 2), (8, 3))
    for seed in (0, 1)
]
LARGE = [("mixtral", 12, 1, 0), ("qwen3", 12, 2, 0), ("olmoe", 12, 3, 0)]  # of their 4,000 subsets every 31st, or all
CASES += [(*case, step) for case in LARGE for step in (31, 1)]
SAMPLE = [case for case in CASES if case[1] == 4 or (case[3:] == (0, 1) and case[1] == 8) or case[4] == 31]


def pruned_block(layer, kept):
    """A block with fewer experts, cut by hand."""
    block = copy.deepcopy(layer.block)
    for module, names in ((block.gate, ["weight"]), (block.experts, ["gate_up_proj", "down_proj"])):
        for name in names:
            setattr(module, name, torch.nn.Parameter(getattr(module, name)[list(kept)]))
        module.num_experts = len(kept)
    return block


def subsets(n, k):
    return [c for r in range(k, n + 1) for c in itertools.combinations(range(n), r)]


@torch.no_grad()
def reference_losses(model, number, tokens, wanted):
    """||F'(x, C) - F(x)||_F for each subset, by running the block again."""
    layer, x = moe_layers(model)[number], block_input(model, number, tokens)
    target = layer.block(x)
    return [(pruned_block(layer, kept)(x) - target).double().norm().item() for kept in wanted]


@pytest.mark.parametrize(("family", "n", "k", "seed", "step"), sampled(CASES, SAMPLE))
def test_loss_of_every_subset_is_exact(family, n, k, seed, step):
    model, tokens = random_model(family, n, k, seed), random_tokens(2, 16, seed)
    traced = esparse.trace(model, tokens, batch_size=1, chunk_tokens=7)
    wanted = subsets(n, k)[::-step][::-1]  # the last one is that of all experts
    reference = reference_losses(model, 1, tokens, wanted)
    ours = [esparse.reconstruction_loss(traced.layers[1], kept) for kept in wanted]
    full = reference.pop()
    assert full == 0 and ours.pop() < 1e-9 * max(ours)
    for mine, theirs in zip(ours, reference, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("family", ["mixtral", "qwen3", "olmoe"])
def test_lower_precision_agrees_and_chooses_the_same(family, dtype, tolerance):
    """bf16 rounds each expert output to 8 bits, and so does the pruned block it is compared with."""
    model, tokens = random_model(family, 8, 2, dtype=dtype), random_tokens(8, 32)
    traced = esparse.trace(model, tokens)
    wanted = list(itertools.combinations(range(8), 6))
    reference = reference_losses(model, 0, tokens, wanted)
    ours = [esparse.reconstruction_loss(traced.layers[0], kept) for kept in wanted]
    assert ours == pytest.approx(reference, rel=tolerance)
    plan = esparse.search_experts(traced, 6, loss="eq3")
    (chosen,) = (i for i, subset in enumerate(wanted) if list(subset) == plan.kept[0])
    assert reference[chosen] <= min(reference) * (1 + tolerance)


@pytest.mark.parametrize("keep", [None, 5, 8])
def test_tracing_leaves_the_model_alone_and_only_reaches_as_far_as_asked(keep):
    model, tokens = random_model("mixtral", 8, 2), random_tokens()
    before = model(tokens).logits
    traced = esparse.trace(model, tokens, keep=keep)
    assert torch.equal(model(tokens).logits, before)
    assert traced.layers[0].order.shape[1] == {None: 8, 5: 5, 8: 2}[keep]
    assert traced.keep == (keep or 2)
    assert not any(hasattr(layer.experts, "esparse_recorder") for layer in moe_layers(model))


def test_the_traced_pass_carries_the_stock_hidden_states():
    """Later layers see what they see without tracing, so their logits are the gate's own."""
    model, tokens = random_model("mixtral", 8, 2), random_tokens()
    stock = model(tokens, output_router_logits=True).router_logits
    traced = esparse.trace(model, tokens, batch_size=1)
    for layer, logits in zip(traced.layers, stock, strict=True):
        assert apart(layer.logits, logits.double()) < 1e-12


def reference_progressive(model, r, tokens):
    """Table 6 by its definition: run the model pruned so far, choose by the original block's output on its own input."""
    layers, pruned, chosen = moe_layers(model), copy.deepcopy(model), []
    for number, layer in enumerate(layers):
        with torch.no_grad():
            target = layer.block(block_input(model, number, tokens))
            x = block_input(pruned, number, tokens)
            candidates = list(itertools.combinations(range(layer.n), r))
            losses = [(pruned_block(layer, kept)(x) - target).norm().item() for kept in candidates]
        best = candidates[losses.index(min(losses))]
        cut = pruned_block(layer, best)
        block = moe_layers(pruned)[number].block
        block.gate, block.experts = cut.gate, cut.experts
        chosen.append((list(best), min(losses)))
    return chosen


@pytest.mark.parametrize(("family", "n", "k", "r"), [("mixtral", 4, 2, 3), ("olmoe", 8, 2, 6), ("qwen3", 8, 3, 4)])
def test_progressive_is_the_definition(family, n, k, r):
    model, tokens = random_model(family, n, k), random_tokens()
    options = {"method": "progressive", "loss": "eq3", "model": model, "tokens": tokens}
    plan = esparse.search_experts(esparse.trace(model, tokens), r, **options)
    reference = reference_progressive(model, r, tokens)
    assert plan.kept == [kept for kept, _ in reference]
    assert plan.losses == pytest.approx([loss for _, loss in reference], rel=1e-9)


@pytest.mark.parametrize("family", ["mixtral", "qwen3", "olmoe"])
@pytest.mark.parametrize(("n", "k", "r"), [(4, 1, 2), (8, 2, 6), (8, 3, 3), (12, 2, 7)])
def test_masked_equals_pruned(family, n, k, r):
    model, tokens = random_model(family, n, k, dtype=torch.float32), random_tokens()
    plan = esparse.search_experts(esparse.trace(model, tokens), r, method="random", seed=3)
    with esparse.masked(model, plan):
        masked = model(tokens).logits
    pruned = esparse.prune(copy.deepcopy(model), plan)
    assert apart(pruned(tokens, output_router_logits=True).logits, masked) < 1e-5
    assert not torch.equal(model(tokens).logits, masked)  # and the mask is gone
    layer = moe_layers(pruned)[0]
    assert (layer.n, layer.k, layer.experts.gate_up_proj.shape[0]) == (r, k, r)


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
@pytest.mark.parametrize("k", [2, 3])
def test_median_beta_drops_half_of_the_pairs(family, k):
    model, tokens = random_model(family, 8, k), random_tokens(16, 32)
    traced = esparse.trace(model, tokens)
    for kept in (None, [list(range(5))] * 3):
        betas = esparse.median_betas(traced, kept)
        for layer, beta in zip(traced.layers, betas, strict=True):
            assert esparse.dropped_share(layer, beta, kept and kept[0]) == pytest.approx(0.5, abs=0.01)


def test_median_beta_of_two_experts_is_the_papers():
    """Section 3.3: the median of w_e1 / w_e0, taken by the standard library from the model's own router logits."""
    model, tokens = random_model("mixtral", 8, 2), random_tokens(8, 32)
    tops = [logits.softmax(-1).topk(2).values for logits in model(tokens, output_router_logits=True).router_logits]
    expected = [statistics.median((top[:, 1] / top[:, 0]).tolist()) for top in tops]
    assert esparse.median_betas(esparse.trace(model, tokens)) == pytest.approx(expected, rel=1e-6)


def reference_skip(layer, x, beta):
    """One token at a time, in plain Python, from the gate's output and single experts."""
    _, weights, chosen = layer.gate(x)
    rows = []
    for token in range(len(x)):
        pairs = sorted(zip(weights[token].tolist(), chosen[token].tolist(), strict=True), reverse=True)
        kept = [
            (w, e)
            for j, (w, e) in enumerate(pairs)
            if j == 0 or sum(p[0] for p in pairs[j:]) / sum(p[0] for p in pairs[:j]) >= beta
        ]
        scale = sum(p[0] for p in pairs) / sum(p[0] for p in kept) if layer.router.normalises else 1.0
        rows.append(sum(w * scale * _expert(layer.experts, e, x[token]) for w, e in kept))
    return torch.stack(rows)


def _expert(experts, number, x):
    gate, up = (experts.gate_up_proj[number] @ x).chunk(2)
    return experts.down_proj[number] @ (torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("family", ["mixtral", "qwen3", "olmoe"])
@pytest.mark.parametrize("k", [2, 4, 8])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.7, 2.5])
@torch.no_grad()
def test_skipping_equals_plain_python(family, k, beta):
    model, tokens = random_model(family, 12, k), random_tokens(2, 12)
    layer, x = moe_layers(model)[1], block_input(model, 1, tokens)
    with esparse.skipping(model, [beta] * 3):
        ours = layer.block(x)
    reference = reference_skip(layer, x.flatten(0, 1), beta).view_as(ours)
    assert apart(ours, reference) < 1e-6  # the weights are float32 in every stock router
    traced = esparse.trace(model, tokens).layers[1]
    expected = (reference - layer.block(x)).norm().item()
    rounding = 1e-7 * losses.output_norm(traced)
    assert esparse.reconstruction_loss(traced, None, beta) == pytest.approx(expected, rel=1e-5, abs=rounding)


@pytest.mark.parametrize("family", ["mixtral", "qwen3", "olmoe"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_beta_zero_changes_nothing(family, dtype):
    """Identical to our path by another route through the rule; stock to rounding, block by block on the same input,
    since a rounding in bf16 may send a token of a later layer to other experts."""
    model, tokens = random_model(family, 8, 2, dtype=dtype), random_tokens()
    inputs = [block_input(model, number, tokens) for number in range(3)]
    stock = [layer.block(x) for layer, x in zip(moe_layers(model), inputs, strict=True)]
    with esparse.skipping(model, [0.0] * 3):
        ours = [layer.block(x) for layer, x in zip(moe_layers(model), inputs, strict=True)]
        whole = model(tokens).logits
        assert esparse.skipped_shares(model, tokens) == [0.0] * 3
    with esparse.skipping(model, [1e-30] * 3):  # drops nothing either
        assert torch.equal(model(tokens).logits, whole)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    for mine, theirs in zip(ours, stock, strict=True):
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("family", ["mixtral", "qwen3", "olmoe"])
@pytest.mark.parametrize("tokens", [1, 24])
@torch.no_grad()
def test_skipping_in_bf16_is_the_reference_rule_to_rounding(family, tokens):
    """The rule in plain Python and float64, on the same bf16 weights, inputs and routing weights."""
    model = random_model(family, 12, 4, dtype=torch.bfloat16)
    layer, x = moe_layers(model)[1], block_input(model, 1, random_tokens(1, tokens))
    with esparse.skipping(model, [0.4] * 3):
        ours = layer.block(x)
    _, weights, chosen = layer.gate(x.flatten(0, 1))
    layer.experts.double()
    given = type("Given", (), {"gate": lambda _, x: (None, weights, chosen), "experts": layer.experts, "router": layer.router})
    reference = reference_skip(given(), x.flatten(0, 1).double(), 0.4)
    assert (ours.view_as(reference) - reference).abs().max() <= 2**-6 * reference.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_dropped_pairs_are_left_out_of_the_computation(dtype):
    """With top-1 routing a token's second expert may hold NaN: it is never multiplied with anything."""
    model, tokens = random_model("mixtral", 4, 2, dtype=dtype), random_tokens()
    layer = moe_layers(model)[0]
    token = block_input(model, 0, tokens)[:1, :1]
    first = layer.gate(token[0])[2][0, 0].item()
    layer.experts.down_proj[[e for e in range(4) if e != first]] = float("nan")
    assert layer.block(token).isnan().all()
    with esparse.skipping(model, [1.0, 0.0, 0.0]):
        assert torch.isfinite(layer.block(token)).all()


@torch.no_grad()
def test_skipping_works_on_masked_and_pruned_models_and_in_generation():
    model, tokens = random_model("mixtral", 8, 2, dtype=torch.float32), random_tokens(1, 8)
    plan = esparse.search_experts(esparse.trace(model, random_tokens(8)), 5)
    betas = esparse.median_betas(esparse.trace(model, random_tokens(8)), plan.kept)
    with esparse.masked(model, plan), esparse.skipping(model, betas):
        masked = model(tokens).logits
    pruned = esparse.prune(copy.deepcopy(model), plan)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
    plain = pruned.generate(tokens, **options)
    esparse.enable_skipping(pruned, betas)
    assert apart(pruned(tokens).logits, masked) < 1e-5
    assert_greedy(pruned, pruned.generate(tokens, **options), tokens.shape[1])
    esparse.disable_skipping(pruned)
    assert torch.equal(pruned.generate(tokens, **options), plain)


@torch.no_grad()
def test_frequencies_are_counts_of_the_gates_choices():
    model, tokens = random_model("mixtral", 8, 2), random_tokens()
    layer = moe_layers(model)[1]
    chosen = layer.gate(block_input(model, 1, tokens).flatten(0, 1))[2].tolist()
    traced = esparse.trace(model, tokens).layers[1]
    counts = [sum(e in pair for pair in chosen) / len(chosen) for e in range(8)]
    together = sum({2, 5} <= set(pair) for pair in chosen) / len(chosen)
    assert esparse.selection_frequency(traced).tolist() == pytest.approx(counts)
    assert esparse.co_selection(traced)[2, 5].item() == pytest.approx(together)
    plan = esparse.search_experts(esparse.trace(model, tokens), 5, method="frequency")
    assert min(counts[e] for e in plan.kept[1]) >= max(c for e, c in enumerate(counts) if e not in plan.kept[1])


@torch.no_grad()
def test_distances_and_norms_come_from_the_outputs():
    model, tokens = random_model("mixtral", 8, 2), random_tokens()
    layer, x = moe_layers(model)[1], block_input(model, 1, tokens).flatten(0, 1)
    traced = esparse.trace(model, tokens).layers[1]
    chosen = layer.gate(x)[2]
    distance = lambda a, b, t: (_expert(layer.experts, a, t) - _expert(layer.experts, b, t)).norm().item()  # noqa: E731
    expected = [distance(a, b, t) for (a, b), t in zip(chosen, x, strict=True)]
    assert losses.expert_distances(traced).tolist() == pytest.approx(expected, rel=1e-9)
    assert losses.output_norm(traced) == pytest.approx(layer.block(x[None]).norm().item(), rel=1e-9)


def test_a_part_of_a_trace_is_the_trace_of_the_part():
    model, tokens = random_model("mixtral", 8, 2), random_tokens(4, 10)
    whole, alone = esparse.trace(model, tokens).layers[0], esparse.trace(model, tokens[1:3]).layers[0]
    cut = trace.part(whole, torch.arange(10, 30))
    for kept in itertools.combinations(range(8), 5):
        assert esparse.reconstruction_loss(cut, kept) == pytest.approx(esparse.reconstruction_loss(alone, kept), rel=1e-9)


def test_greedy_never_beats_enumeration_and_equals_it_one_expert_down():
    model, tokens = random_model("mixtral", 8, 2), random_tokens()
    traced = esparse.trace(model, tokens)
    for r in (7, 6, 4):
        best, greedy = esparse.search_experts(traced, r), esparse.search_experts(traced, r, method="greedy")
        assert all(a <= b * (1 + 1e-12) for a, b in zip(best.losses, greedy.losses, strict=True))
        assert all(a <= b for a, b in zip(best.losses, best.runner_up, strict=True))
    assert esparse.search_experts(traced, 7).kept == esparse.search_experts(traced, 7, method="greedy").kept


@pytest.mark.parametrize(
    ("family", "n", "k", "r"), [("mixtral", 8, 2, 6), ("mixtral", 12, 3, 8), ("qwen3", 8, 2, 4), ("qwen3", 6, 1, 3)]
)
@torch.no_grad()
def test_losses_by_choice_are_those_of_every_subset_routed_by_itself(family, n, k, r):
    """In float32, where all subsets' losses come from a table of choices, against masking each subset in float64."""
    model, tokens = random_model(family, n, k, dtype=torch.float32), random_tokens()
    subsets, losses = esparse.subset_losses(esparse.trace(model, tokens, keep=r).layers[0], r)
    double = random_model(family, n, k)
    layer, x = moe_layers(double)[0], block_input(double, 0, tokens)
    before = layer.block(x)
    for subset, loss in list(zip(subsets, losses.tolist(), strict=True))[::5]:
        with masked_layer(layer, subset):
            assert loss == pytest.approx((layer.block(x) - before).norm().item(), rel=2e-4)


def test_losses_by_choice_of_a_progressive_trace_and_of_all_experts():
    model, tokens = random_model("mixtral", 8, 2, dtype=torch.float32), random_tokens()
    walk = Walk(model, tokens, progressive=True)
    with torch.no_grad():
        walk.trace_layer(0, 5)
        walk.follow(0, [0, 1, 2, 3, 4])
        traced = walk.trace_layer(1, 5)
    subsets, losses = esparse.subset_losses(traced, 5)
    assert torch.allclose(losses, losses_of(traced, subsets), rtol=1e-4)
    whole = esparse.trace(model, tokens, keep=5).layers[0]
    assert esparse.subset_losses(whole, 8)[1].item() == 0.0


@torch.no_grad()
def test_losses_by_choice_stand_logits_far_apart():
    """Beside the best expert's logit a softmax over all rounds the others' to 0: among those left they still differ."""
    model = random_model("mixtral", 6, 2, dtype=torch.float32)
    layer = esparse.trace(model, random_tokens(), keep=3).layers[1]
    layer.logits[0, layer.order[0, 0]] += 150
    subsets, found = esparse.subset_losses(layer, 3)
    assert torch.allclose(found, losses_of(layer, subsets), rtol=1e-5)


def test_out_of_memory_halves_the_chunk_and_goes_on(monkeypatch):
    model, tokens = random_model("mixtral", 8, 2), random_tokens()
    expected, run, tried = esparse.trace(model, tokens, keep=6), experts.pair_outputs, []

    def little(experts, hidden_states, *rest):
        tried.append(len(hidden_states))
        if len(hidden_states) > 12:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(experts, hidden_states, *rest)

    monkeypatch.setattr(recorder, "pair_outputs", little)
    found = esparse.trace(model, tokens, keep=6)
    assert tried[:5] == [80, 80, 80, 80, 80] and max(tried[-5:]) <= 12  # halved from a chunk that all tokens fit into
    for mine, theirs in zip(found.layers, expected.layers, strict=True):
        assert torch.allclose(mine.gram, theirs.gram, rtol=1e-12) and torch.equal(mine.order, theirs.order)
    monkeypatch.setattr(recorder, "pair_outputs", lambda *_: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        esparse.trace(model, tokens)


@pytest.mark.parametrize("family", ["mixtral", "qwen3", "olmoe"])
@pytest.mark.parametrize(("n", "k"), [(2, 1), (2, 2), (3, 2), (3, 3), (8, 2)])
def test_keeping_all_experts_loses_nothing_by_any_method(family, n, k):
    """The control of every comparison, and all that there is where a token is routed to every expert."""
    model, tokens = random_model(family, n, k), random_tokens(2, 16)
    with torch.no_grad():
        expected = model(tokens).logits
    for keep in {k, n}:
        traced = esparse.trace(model, tokens, keep=keep)
        norms = [losses.output_norm(losses.weighed(layer, "residual")) for layer in traced.layers]
        for method in SEARCH_METHODS:
            plan = esparse.search_experts(traced, n, method=method, model=model, tokens=tokens)
            assert plan.kept == [[*range(n)]] * 3
            assert all(loss <= 1e-6 * norm for loss, norm in zip(plan.losses, norms, strict=True))
        assert subset_losses(traced.layers[0], n)[0] == [(*range(n),)]
        assert k == 1 or esparse.median_betas(traced, plan.kept) == esparse.median_betas(traced)
    with esparse.masked(model, plan), torch.no_grad():
        assert apart(model(tokens).logits, expected) < 1e-9
    assert moe_layers(esparse.prune(model, plan))[0].n == n


@pytest.mark.parametrize("method", SEARCH_METHODS)
@pytest.mark.parametrize(("n", "k"), [(2, 1), (3, 1), (3, 2)])
def test_of_two_or_three_experts_one_can_go(n, k, method):
    model, tokens = random_model("mixtral", n, k), random_tokens(2, 16)
    options = {"method": method, "loss": "eq3", "model": model, "tokens": tokens, "seed": 3}
    plan = esparse.search_experts(esparse.trace(model, tokens), n - 1, **options)
    wanted = [*itertools.combinations(range(n), n - 1)]
    losses = dict(zip(wanted, reference_losses(model, 0, tokens, wanted), strict=True))
    assert plan.losses[0] == pytest.approx(losses[tuple(plan.kept[0])], rel=1e-9)
    if method in ("enumerate", "greedy", "progressive"):
        assert plan.losses[0] == pytest.approx(min(losses.values()), rel=1e-9)
