"""A model that runs as if pruned, and a model pruned in place."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..moe.gates import per_expert, table
from ..moe.identity import fingerprint
from ..moe.layers import MoELayer, count_names, moe_layers
from ..moe.masking import masked_layer
from ..moe.routers import pruned_table
from ..moe.running import check_held, uncompiled
from .plan import PruningPlan


def planned_layers(model, plan: PruningPlan) -> list[tuple[MoELayer, list[int]]]:
    """The model's MoE layers, each with the experts that it keeps. Raises ValueError for a plan made with another model."""
    layers = moe_layers(model)
    plan.check(fingerprint(model), [(layer.n, layer.k, layer.router) for layer in layers])
    return list(zip(layers, plan.kept, strict=True))


@contextmanager
def masked(model, plan: PruningPlan) -> Iterator[None]:
    """Runs the model as if pruned: routing leaves removed experts out, and no weight is copied or changed.

    Router logits that transformers records are -inf for removed experts. A compiled model runs uncompiled meanwhile.
    Raises ValueError for a plan made with another model.
    """
    with ExitStack() as stack, uncompiled():
        for layer, kept in planned_layers(model, plan):
            stack.enter_context(masked_layer(layer, kept))
        yield


@torch.no_grad()
def prune(model, plan: PruningPlan):
    """Remove the experts outside the plan, in place, and return the model: an ordinary one with fewer experts.

    Raises ValueError, before anything changes, for a plan made with another model and for offloaded MoE layers.
    """
    check_held((layer.block for layer in moe_layers(model)), "prune from disk to disk, with prune_checkpoint")
    planned = planned_layers(model, plan)
    n, configs = planned[0][0].n, [model.config, model.config.get_text_config()]
    for layer, kept in planned:
        prune_layer(layer, kept)
        configs.append(layer.experts.config)
    for holder in (model, model.base_model, *configs):  # a stale count breaks the balance loss or a reload
        for name in count_names(holder, n):
            setattr(holder, name, plan.r)
    return model


def prune_layer(layer: MoELayer, kept: Sequence[int]) -> None:
    """Remove experts from every tensor of one layer that is indexed by expert, and from the counts on its modules."""
    n, extra, lookup = layer.n, layer.router.extra_logits, table(layer.gate)
    if lookup:
        setattr(layer.gate, lookup, pruned_table(getattr(layer.gate, lookup), kept, n))
    cuts = list(per_expert(layer.block, layer.gate, n, extra))
    cuts += [(layer.experts, name, 0) for name, p in layer.experts.named_parameters(recurse=False) if p.shape[0] == n]
    for module, name, axis in cuts:
        tensor = getattr(module, name)
        rows = cut(tensor, axis, kept, n)
        setattr(module, name, nn.Parameter(rows, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else rows)
    for module in (layer.block, layer.experts, *layer.gate.modules()):
        for name in count_names(module, n):
            setattr(module, name, len(kept))
        if extra and getattr(module, "num_router_classes", None) == n + extra:
            module.num_router_classes = len(kept) + extra
        if isinstance(module, nn.Linear) and module.weight.shape[0] == len(kept) + extra:  # the gate or part of it
            module.out_features = len(kept) + extra


def cut(tensor: Tensor, axis: int, kept: Sequence[int], n: int) -> Tensor:
    """The entries of the kept experts along `axis`, and all entries after those of the n experts."""
    numbers = torch.tensor([*kept, *range(n, tensor.shape[axis])], device=tensor.device)
    return tensor.index_select(axis, numbers)
