"""What to prune, as a plan; a model as if pruned; and pruning."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from .files import read_json, refuse_existing, write_json
from .models import MoELayer, check_fingerprint, check_held, count_names, moe_layers, uncompiled
from .routers import all_logits, per_expert, pruned_table, table, table_ranking, unpack
from .traces import check_experts


@dataclass
class PruningPlan:
    """Which experts each layer keeps, in rising order, and what that costs.

    losses: the reconstruction loss (Eq. 3) of each layer's choice on the calibration set; runner_up: that of the second
    best subset, where all were tried. model and tokens name what the plan was made from. betas: to skip with on top of it, one
    a layer, where the plan says so.
    """

    method: str
    r: int
    kept: list[list[int]]
    losses: list[float]
    model: str
    tokens: str
    runner_up: list[float] | None = None
    betas: list[float] | None = None

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; raises FileExistsError if `path` exists."""
        write_json(refuse_existing(path), asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "PruningPlan":
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError for a file that is no plan."""
        try:
            plan = cls(**read_json(path, "pruning plan"))
            whole = isinstance(plan.r, int) and len(plan.losses) == len(plan.kept)
            whole = whole and all(isinstance(expert, int) for kept in plan.kept for expert in kept)
        except TypeError:
            whole = False
        if not whole:
            raise ValueError(f"{path} is no pruning plan of esparse.")
        return plan


def _masking_hook(layer: MoELayer, kept: list[int]):
    """Gate hook: what the gate would return had it only the kept experts, under their old numbers."""

    router, n = layer.router, layer.n

    def hook(gate, inputs, output):
        logits, _, chosen = unpack(output)
        if router.score == "given":  # the softmax of those that stay
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
        removed = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
        removed[columns[columns < logits.shape[1]]] = False
        return logits.masked_fill(removed, float("-inf")), weights, numbers, *more

    return hook


@contextmanager
def masked_layer(layer: MoELayer, kept: Sequence[int]) -> Iterator[None]:
    # First of the gate's hooks: whoever listens already, as transformers to record router logits, hears the masked router.
    handle = layer.gate.register_forward_hook(_masking_hook(layer, list(kept)), prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _check_plan(model, plan: PruningPlan) -> list[MoELayer]:
    layers = moe_layers(model)
    check_fingerprint(model, plan.model, "pruning plan")
    if len(plan.kept) != len(layers):
        raise ValueError(f"The pruning plan is for {len(plan.kept)} MoE layers, the model has {len(layers)}.")
    for layer, kept in zip(layers, plan.kept, strict=True):
        check_experts(len(kept), layer.n, layer.k, router=layer.router)
        if len(kept) != plan.r or sorted(set(kept)) != list(kept) or kept[0] < 0 or kept[-1] >= layer.n:
            raise ValueError(f"{layer.name}: the plan must keep {plan.r} different experts in rising order, got {kept}.")
    return layers


@contextmanager
def masked(model, plan: PruningPlan) -> Iterator[None]:
    """The model as if pruned: removed experts are taken out of the routing, no weight is copied or changed.

    Router logits that transformers records inside are those of the kept experts, at their old numbers; the others' are -inf.
    A compiled model runs uncompiled meanwhile. Raises ValueError for a plan made with another model.
    """
    with ExitStack() as stack, uncompiled():
        for layer, kept in zip(_check_plan(model, plan), plan.kept, strict=True):
            stack.enter_context(masked_layer(layer, kept))
        yield


@torch.no_grad()
def prune(model, plan: PruningPlan):
    """Remove the experts outside the plan, in place, and return the model: an ordinary one with fewer experts.

    Everything is checked before anything changes. One layer is copied at a time. Raises ValueError for a plan made
    with another model, and for MoE layers that accelerate has offloaded.
    """
    check_held((layer.block for layer in moe_layers(model)), "prune from disk to disk, with prune_checkpoint")
    layers = _check_plan(model, plan)
    n, configs = layers[0].n, (model.config, model.config.get_text_config(), *(layer.experts.config for layer in layers))
    for layer, kept in zip(layers, plan.kept, strict=True):
        prune_layer(layer, kept)
    for holder in (model, model.base_model, *configs):  # a stale count breaks the balance loss, or the next reload
        for name in count_names(holder, n):
            setattr(holder, name, plan.r)
    return model


def prune_layer(layer: MoELayer, kept: Sequence[int]) -> None:
    """Cut every tensor of one layer that is indexed by expert, and the counts on its modules."""
    n, beside, lookup = layer.n, layer.router.beside, table(layer.gate)
    if lookup:
        setattr(layer.gate, lookup, pruned_table(getattr(layer.gate, lookup), kept, n))
    cuts = list(per_expert(layer.block, layer.gate, n, beside))
    cuts += [
        (layer.experts, name, 0)
        for name, tensor in layer.experts.named_parameters()
        if tensor.shape[0] == n and "." not in name
    ]
    for module, name, axis in cuts:
        tensor = getattr(module, name)
        rows = cut(tensor, axis, kept, n)
        setattr(module, name, nn.Parameter(rows, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else rows)
    for module in (layer.block, layer.experts, *layer.gate.modules()):
        for name in count_names(module, n):
            setattr(module, name, len(kept))
        if beside and getattr(module, "num_router_classes", None) == n + beside:
            module.num_router_classes = len(kept) + beside
        if isinstance(module, nn.Linear) and module.weight.shape[0] == len(kept) + beside:  # a gate, or within one
            module.out_features = len(kept) + beside
    for found in ("_identified", "_leaving"):  # asked again of the smaller layer
        vars(layer).pop(found, None)


def cut(tensor: torch.Tensor, axis: int, kept: Sequence[int], n: int) -> torch.Tensor:
    """The entries of the kept ones of n experts, and whatever stands behind those of the experts."""
    numbers = torch.tensor([*kept, *range(n, tensor.shape[axis])], device=tensor.device)
    return tensor.index_select(axis, numbers)
