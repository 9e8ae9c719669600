"""Properties of the skipping rule and of losses, on whatever hypothesis thinks of."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esparse.routers import SoftmaxRouter, skip_pairs, skip_ratios
from esparse.traces import LayerTrace, reconstruction_loss

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


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(3, 7), st.integers(1, 3), st.booleans())
def test_loss_from_the_gram_is_the_norm_of_the_change(seed, n, k, renormalise):
    """A layer made of nothing but logits and output vectors, every subset recomputed from the vectors."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(20, n, generator=generator, dtype=torch.float64)
    outputs = torch.randn(20, n, 5, generator=generator, dtype=torch.float64)
    router = SoftmaxRouter(renormalise, cast=False)
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
            expected = (output(kept) - output(list(range(n)))).norm().item()
            assert abs(reconstruction_loss(layer, kept) - expected) <= 1e-7 + 1e-9 * expected
