"""Routes one MoE layer as if it had only some of its experts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from .gates import all_logits, unpack
from .layers import MoELayer
from .routers import table_ranking


@contextmanager
def masked_layer(layer: MoELayer, kept: Sequence[int]) -> Iterator[None]:
    """Makes the gate route among the kept experts alone; they keep their numbers."""
    router, n, kept = layer.router, layer.n, list(kept)

    def mask(gate, inputs, output):
        logits, _, chosen = unpack(output)
        if router.score == "given":  # probabilities among the kept experts
            logits = logits / logits[:, kept].clamp(min=0).sum(1, keepdim=True)
        every = all_logits(router, gate, inputs, logits)
        columns = torch.tensor([*kept, *range(n, every.shape[1])], device=logits.device)
        some = every[:, columns]
        ranking = table_ranking(chosen, n)[:, columns] if router.table else router.ranking(some, columns)
        chosen = ranking.topk(layer.k).indices
        weights, numbers = router.weights(some, chosen, columns[chosen]), columns[chosen]
        if router.idle:
            weights, numbers = weights.masked_fill(numbers == n, 0), numbers.masked_fill(numbers == n, kept[0])
        more = (router.shared_weights(some, chosen),) if router.shared else output[3:]
        removed = torch.tensor([e for e in range(n) if e not in kept], dtype=torch.long, device=logits.device)
        return logits.index_fill(1, removed, float("-inf")), weights, numbers, *more

    # Runs first, so that the gate's other hooks, such as transformers' recording of router logits, see the masked router.
    with layer.gate.register_forward_hook(mask, prepend=True):
        yield
