"""Properties of the skipping rule and of losses, on inputs from hypothesis."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esparse import kernels
from esparse.moe.experts import Scratch, _grouped, pair_outputs
from esparse.moe.routers import Router, skip_pairs, skip_ratios
from esparse.pruning.scores import ranked
from esparse.pruning.search import best_subset
from esparse.tracing.losses import reconstruction_loss
from esparse.tracing.statistics import betas_of_shares
from esparse.tracing.trace import LayerTrace

weights = st.integers(2, 8).flatmap(
    lambda k: st.lists(st.lists(st.floats(1e-3, 1.0), min_size=k, max_size=k), min_size=1, max_size=5)
)


def falling(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).sort(dim=1, descending=True).values


@given(weights, st.floats(0, 3), st.floats(0, 3))
def test_a_larger_beta_never_drops_less_and_the_first_expert_stays(rows, one, other):
    given_weights = falling(rows)
    fewer = skip_pairs(given_weights, max(one, other), True)[0]
    more = skip_pairs(given_weights, min(one, other), True)[0]
    assert (fewer <= more).all() and fewer[:, 0].all()
    assert (fewer.long().diff(dim=1) <= 0).all()  # what is dropped is a tail


@given(weights, st.floats(0, 3))
def test_renormalised_weights_keep_their_sum_and_others_are_untouched(rows, beta):
    given_weights = falling(rows)
    keep, kept = skip_pairs(given_weights, beta, True)
    assert torch.allclose(kept.sum(1), given_weights.sum(1))
    keep, kept = skip_pairs(given_weights, beta, False)
    assert torch.equal(kept, given_weights * keep)


@given(weights)
def test_ratios_are_tail_over_head(rows):
    given_weights = falling(rows)
    expected = [[sum(row[j:]) / sum(row[:j]) for j in range(1, len(row))] for row in given_weights.tolist()]
    assert torch.allclose(skip_ratios(given_weights), torch.tensor(expected, dtype=torch.float64))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(0, 10_000))
def test_what_rounding_alone_tells_apart_keeps_its_order(levels, seed):
    """Losses that are the same but for rounding, of squares that sum float32 products: ranked by level, then by index."""
    levels = [*levels, 5]  # what rounding is measured by
    noise = torch.rand(len(levels), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    losses = (torch.tensor(levels, dtype=torch.float64) ** 2 + 1e-9 * noise).sqrt()
    assert ranked(losses).tolist() == sorted(range(len(levels)), key=levels.__getitem__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.sampled_from(list(itertools.combinations(range(6), 2))))
def test_of_two_experts_that_nobody_chooses_the_first_subset_lacks_the_second(dtype, seed, unused):
    """Both subsets lose nothing, and what their losses say is rounding."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(50, 6, generator=generator, dtype=dtype)
    logits[:, unused] -= 20
    outputs = torch.randn(50, 6, 5, generator=generator, dtype=dtype)
    order, (i, j) = logits.argsort(1, descending=True), torch.triu_indices(6, 6)
    ranking = outputs.gather(1, order[..., None].expand(-1, -1, 5))
    layer = LayerTrace("layer", 2, Router(renormalise=True), logits, order, (ranking @ ranking.mT)[:, i, j])
    kept, loss, runner_up = best_subset(layer, 5)
    assert kept == [e for e in range(6) if e != unused[1]] and loss <= runner_up


@given(st.lists(st.integers(0, 20), min_size=2, max_size=40), st.integers(0, 10_000))
def test_every_machine_drops_the_same_pairs(levels, seed):
    """Ratios that are the same but for rounding stay or go together, at the share that is aimed at or before it."""
    exact, shares = torch.tensor(sorted(levels), dtype=torch.float64) / 20, (0.0, 0.3, 0.5, 0.9, 1.0)
    noise = torch.rand(len(levels), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ratios = exact + 1e-9 * noise
    for share, beta in zip(shares, betas_of_shares(ratios.sort().values, shares), strict=True):
        aimed = exact[min(int(share * len(exact)), len(exact) - 1)]
        assert torch.equal(ratios < beta, exact < aimed if share < 1 else exact < 2)
        assert (ratios.float() < beta).sum() == (ratios < beta).sum()  # as the model compares


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(3, 7), st.integers(1, 3), st.booleans())
def test_loss_from_the_gram_is_the_norm_of_the_change(seed, n, k, renormalise):
    """A layer made of nothing but logits and output vectors, every subset recomputed from the vectors."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(20, n, generator=generator, dtype=torch.float64)
    outputs = torch.randn(20, n, 5, generator=generator, dtype=torch.float64)
    router = Router(renormalise=renormalise)
    order = logits.argsort(1, descending=True)
    ranked = outputs.gather(1, order[..., None].expand(-1, -1, 5))
    i, j = torch.triu_indices(n, n)
    layer = LayerTrace("layer", k, router, logits, order, (ranked @ ranked.mT)[:, i, j])

    def output(kept):
        chosen = logits[:, kept].topk(k).indices
        w = logits[:, kept].float().softmax(1).gather(1, chosen)
        w = w / w.sum(1, keepdim=True) if renormalise else w
        return (w.double()[..., None] * outputs[:, kept].gather(1, chosen[..., None].expand(-1, -1, 5))).sum(1)

    for kept in ([*range(n)][1:], [*range(n)][: max(k, n // 2)]):
        if len(kept) >= k:
            whole = output(list(range(n)))
            expected = (output(kept) - whole).norm().item()
            rounding = 2**-23 * whole.norm().item()  # of routing weights in float32
            assert abs(reconstruction_loss(layer, kept) - expected) <= rounding + 1e-9 * expected


class Experts(torch.nn.Module):
    """What the interface tells of a family's experts: 3 of them, hidden size 4, inner size 5."""

    num_experts = 3

    def __init__(self, gate: bool, bias: bool, transposed: bool):
        super().__init__()
        self.has_gate, self.has_bias, self.is_transposed = gate, bias, transposed
        self.act_fn = torch.nn.Tanh()
        name, width = ("gate_up_proj", 10) if gate else ("up_proj", 5)
        for key, inputs, outputs in ((name, 4, width), ("down_proj", 5, 4)):
            shape = (3, inputs, outputs) if transposed else (3, outputs, inputs)
            setattr(self, key, torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)))
            setattr(self, f"{key}_bias", torch.nn.Parameter(torch.randn(3, outputs, dtype=torch.float64)))

    def _apply_gate(self, hidden):
        return self.act_fn(hidden[..., ::2]) * hidden[..., 1::2]  # interleaved, as in GPT-OSS

    def one(self, number: int, x: torch.Tensor) -> torch.Tensor:
        for key in ("gate_up_proj" if self.has_gate else "up_proj", "down_proj"):
            weight = getattr(self, key)[number]
            x = torch.einsum("i,io->o", x, weight if self.is_transposed else weight.T)
            x = x + getattr(self, f"{key}_bias")[number] if self.has_bias else x
            if key != "down_proj":
                x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
        return x


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@torch.no_grad()
def test_a_cpu_slow_in_bfloat16_multiplies_in_float32_and_rounds_each_product(monkeypatch, bias, transposed):
    """Sums of small integers are exact in any order, so that both routes must agree to the last bit; of other numbers, all but
    few, which lie in the middle between two others."""
    torch.manual_seed(0)
    experts, scratch = Experts(True, bias, transposed).bfloat16(), Scratch()
    hidden, expert = torch.randn(350, 4).bfloat16(), torch.randint(0, 4, (350, 2))
    for whole in (False, True):
        for parameter in experts.parameters() if whole else ():
            parameter.copy_(torch.randint(-4, 5, parameter.shape))
        hidden = torch.randint(-4, 5, hidden.shape).bfloat16() if whole else hidden
        found = []
        for slow in (False, True):
            monkeypatch.setattr("esparse.moe.experts._slow_on_a_cpu", lambda dtype, slow=slow: slow)
            found.append(pair_outputs(experts, hidden, expert, scratch).clone())
        same = (found[0] == found[1]).float().mean()
        assert found[1].dtype == torch.bfloat16 and (same == 1 if whole else same > 0.95)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_pair_outputs_are_each_pairs_own_with_scratch_and_without(gate, bias, transposed):
    torch.manual_seed(0)
    experts, hidden = Experts(gate, bias, transposed), torch.randn(350, 4, dtype=torch.float64)
    expert = torch.randint(0, 2, (350, 2))  # the third is never asked
    expert[::5, 1] = 3  # dropped
    expected = torch.stack([
        torch.stack([experts.one(e, x) if e < 3 else 0 * x for e in chosen])
        for x, chosen in zip(hidden, expert.tolist(), strict=True)
    ])  # fmt: skip
    scratch = Scratch()
    with torch.no_grad():
        for _ in range(2):  # the second time in memory that holds the first result
            assert torch.allclose(pair_outputs(experts, hidden, expert, scratch), expected, rtol=1e-12)
    for outputs in (pair_outputs(experts, hidden, expert), _grouped(experts, hidden, expert, kernels.product)):
        assert torch.allclose(outputs, expected, rtol=1e-12)
    for token in range(6):  # of one token, with a dropped pair and without
        alone = pair_outputs(experts, hidden[token : token + 1], expert[token : token + 1])
        assert torch.allclose(alone[0], expected[token], rtol=1e-12)
    pair_outputs(experts, hidden, expert).sum().backward()  # without scratch the experts can be trained
    assert experts.down_proj.grad[:2].abs().min() > 0 and experts.down_proj.grad[2].abs().max() == 0
