"""How sure a choice of experts is: the bootstrap over calibration sequences, and the choice on fewer of them."""

from dataclasses import replace

import torch
from torch import Tensor

from ..tracing.losses import MAX_TABLE, weighed
from ..tracing.trace import LayerTrace, Trace, part, parts
from .scores import ROUNDING, ranked
from .search import BY_LOSS, all_subsets, check_method, choose_experts, subset_losses


def certainty(
    trace: Trace, r: int, *, method: str = "enumerate", loss: str = "residual", draws: int = 1000, seed: int = 0
) -> list[dict]:
    """How sure the choice of r experts is in every layer, from the trace alone.

    A draw of the bootstrap (Efron 1979) takes as many calibration sequences as there are, with replacement, and chooses again.
    It does not take single tokens, since those of one sequence depend on each other. Each layer's entry, ready for JSON, holds

        "kept": the experts chosen on all sequences; "shares": the share of draws that keep each expert, [n]
        "same": the share of draws that keep just this subset
        "margin": how much more the second best subset loses, in bootstrap standard deviations of that difference of squared
            losses; None where there is no other subset or no spread, and for methods that do not compare all subsets
        "settled": the smallest number of sequences such that these first ones, and any more, choose "kept"

    method, loss: as for `search_experts`. Methods other than "enumerate" search again on the tokens of each draw, and on those
    of the first 1, 2, ... sequences: pass fewer draws. Raises ValueError as `search_experts` does, for
    "random" and "progressive", and for a trace of fewer than two sequences.
    """
    check_method(method)
    if method in ("random", "progressive"):
        raise ValueError(f"method={method!r} does not choose from the trace alone, which the bootstrap draws from.")
    return [layer_certainty(weighed(layer, loss), r, method, draws, seed) for layer in trace.layers]


def layer_certainty(layer: LayerTrace, r: int, method: str = "enumerate", draws: int = 1000, seed: int = 0) -> dict:
    """`certainty` of one layer. Where the trace is split over ranks, each rank returns that of all sequences."""
    sequences, margin = _sequences(layer), None
    beginnings = torch.ones(sequences, sequences, dtype=torch.float64).tril()
    counts = torch.cat([resampled(sequences, draws, seed), beginnings])
    if method == "enumerate":
        subsets, squares = sequence_losses(layer, r)
        chosen, margin = [list(subsets[i]) for i in _best_of(squares, counts)], _margin(squares)
    elif layer.split:
        raise ValueError(f"method={method!r} draws sequences on one process alone: use method='enumerate'.")
    else:
        layer.check_size(r, losses=method in BY_LOSS)
        chosen = [choose_experts(part(layer, _tokens(row, layer.length)), r, method) for row in counts]
    kept, drawn = chosen[-1], chosen[:draws]
    shares = [sum(expert in other for other in drawn) / draws for expert in range(layer.n)]
    settled = max((number for number, other in enumerate(chosen[draws:], 2) if other != kept), default=1)
    return {"kept": kept, "shares": shares, "same": drawn.count(kept) / draws, "margin": margin, "settled": settled}


def _sequences(layer: LayerTrace) -> int:
    """How many sequences the trace holds, on all ranks together. Raises ValueError for fewer than two, or incomplete ones."""
    if layer.length is None or len(layer.order) % layer.length:
        raise ValueError(f"{layer.name}: this trace does not consist of calibration sequences: trace the whole model.")
    own = torch.tensor(len(layer.order) // layer.length, device=layer.order.device)
    if (count := layer.sum_over_ranks(own).item()) < 2:
        raise ValueError(f"{layer.name}: one sequence does not tell how sure a choice is: trace at least two.")
    return count


def resampled(sequences: int, draws: int, seed: int) -> Tensor:
    """How often each bootstrap draw takes each sequence, float64 [draws, sequences]; every row sums to `sequences`."""
    if draws < 1:
        raise ValueError(f"The bootstrap needs at least one draw, got draws={draws}.")
    drawn = torch.randint(sequences, (draws, sequences), generator=torch.Generator().manual_seed(seed))
    return torch.stack([row.bincount(minlength=sequences) for row in drawn]).double()


def sequence_losses(layer: LayerTrace, r: int) -> tuple[list[tuple[int, ...]], Tensor]:
    """Every subset of r experts and its squared loss (Eq. 3) on each sequence of all ranks, float64 [sequences, subsets]."""
    subsets, alone = all_subsets(layer, r), replace(layer, split=False)
    found = [subset_losses(sequence, r)[1].square() for sequence in parts(alone, layer.length)]
    return subsets, layer.over_ranks(torch.stack(found))


def _best_of(squares: Tensor, counts: Tensor) -> list[int]:
    """The best subset for each row of counts [rows, sequences]; of several equal but for rounding the first, as in `ranked`."""
    best, numbers = [], torch.arange(squares.shape[1], device=squares.device)
    for some in counts.to(squares.device).split(max(1, MAX_TABLE // len(numbers))):
        sums = some @ squares
        least = sums.amin(1, keepdim=True) + ROUNDING * sums.amax(1, keepdim=True)
        best += torch.where(sums <= least, numbers, len(numbers)).amin(1).tolist()
    return best


def _margin(squares: Tensor) -> float | None:
    """The runner-up's squared loss less the best one's, divided by the standard deviation of this difference in the bootstrap.

    For a value d of each sequence, the sum over a draw has the variance sum (d - mean d)^2, since a draw takes each sequence a
    multinomial number of times.
    """
    totals = squares.sum(0)
    if len(totals) == 1:
        return None
    best, second = ranked(totals.sqrt())[:2]
    gaps = squares[:, second] - squares[:, best]
    if gaps.sum() <= ROUNDING * totals.max():
        return 0.0
    spread = (gaps - gaps.mean()).norm()
    return (gaps.sum() / spread).item() if spread else None


def _tokens(counts: Tensor, length: int) -> Tensor:
    """The numbers of the tokens of a draw that takes each sequence so many times."""
    sequences = torch.arange(len(counts)).repeat_interleave(counts.long())
    return (sequences[:, None] * length + torch.arange(length)).flatten()
