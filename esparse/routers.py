"""Router kinds and the arithmetic of routing weights: selection, renormalisation, and which pairs skipping drops."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SoftmaxRouter:
    """Softmax over the experts in float32, top-k, then renormalised over the chosen (Mixtral, Eq. 1) or not (OLMoE).

    `cast` says whether the weights are returned in the dtype of the logits (Qwen3-MoE, OLMoE) or stay float32
    (Mixtral). The order of operations is that of the stock routers, so that weights agree to the last bit.
    """

    renormalise: bool
    cast: bool

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """What the experts are ranked by: [tokens, n] float32."""
        return logits.float().softmax(-1)

    def weights(self, logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Routing weights [tokens, k] of the `chosen` columns when only the columns of `logits` exist."""
        weights = self.scores(logits).gather(1, chosen)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(logits.dtype) if self.cast else weights


KINDS = [SoftmaxRouter(renormalise, cast) for renormalise in (True, False) for cast in (False, True)]


def unpack(output) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [tokens, n], weights [tokens, k] and indices [tokens, k] out of what a gate returned.

    Raises TypeError when it returned something else.
    """
    if isinstance(output, tuple) and len(output) == 3 and all(torch.is_tensor(t) and t.ndim == 2 for t in output):
        return output
    raise TypeError("not (logits, weights, indices)")


@torch.no_grad()
def identify(gate: torch.nn.Module, hidden_size: int) -> tuple[SoftmaxRouter, int]:
    """The kind of a router and its k, found by asking it: the kind whose weights equal the gate's on random input.

    Raises ValueError when no known kind does.
    """
    generator = torch.Generator().manual_seed(0)
    weight = next(gate.parameters())
    probe = torch.randn(64, hidden_size, generator=generator).to(weight.device, weight.dtype)
    try:
        logits, weights, chosen = unpack(gate(probe))
        for kind in KINDS:
            if weights.dtype == kind.weights(logits, chosen).dtype and torch.equal(weights, kind.weights(logits, chosen)):
                return kind, chosen.shape[1]
    except (TypeError, RuntimeError):
        pass  # a router with another signature or other shapes is as unknown as one with other weights
    raise ValueError(
        f"The router {type(gate).__name__} computes its routing weights in a way esparse does not know; "
        "known are softmax then top-k, with or without renormalisation (Mixtral, Qwen3-MoE, OLMoE)."
    )


def skip_ratios(weights: torch.Tensor) -> torch.Tensor:
    """rho of the pairs 2..k: the tail's weight over the head's, (w_j + ... + w_k) / (w_1 + ... + w_{j-1}).

    `weights` [tokens, k] in falling order; returns [tokens, k - 1], falling as well. For k = 2 it is w_2 / w_1 (paper,
    Section 3.3); for k > 2 the tail rule of A.2 with its own beta = H / (D - H).
    """
    weights = weights.float() if weights.dtype in (torch.bfloat16, torch.float16) else weights
    tails = weights.flip(1).cumsum(1).flip(1)[:, 1:]
    heads = weights.cumsum(1)[:, :-1]
    return tails / heads


def skip_pairs(weights: torch.Tensor, beta: float, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Which pairs stay, and the routing weights after skipping; both [tokens, k] like `weights`, which fall.

    A pair j >= 2 is dropped when its ratio is below beta: its weight becomes 0. What stays is rescaled to the token's
    former sum where the router renormalises; the factor is computed first, so that nothing dropped changes no bit.
    """
    first = torch.ones_like(weights[:, :1], dtype=torch.bool)
    keep = torch.cat([first, skip_ratios(weights) >= beta], 1)
    kept = weights * keep
    if renormalise:
        kept = kept * (weights.sum(1, keepdim=True) / kept.sum(1, keepdim=True))
    return keep, kept
