"""What to prune, as a plan; a model as if pruned; and pruning."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from .files import read_json, refuse_existing, write_json
from .models import MoELayer, check_fingerprint, check_held, count_names, moe_layers, uncompiled
from .routers import per_expert, unpack
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
            return cls(**read_json(path, "pruning plan"))
        except TypeError:
            raise ValueError(f"{path} is no pruning plan of esparse.") from None


def _masking_hook(layer: MoELayer, kept: list[int]):
    """Gate hook: what the gate would return had it only the kept experts, under their old numbers."""

    def hook(gate, _inputs, output):
        logits, _, _ = unpack(output)
        columns = torch.tensor(kept, device=logits.device)
        if layer.router.score == "given":  # the softmax of those that stay
            logits = logits / logits[:, columns].clamp(min=0).sum(1, keepdim=True)
        chosen = layer.router.select(logits[:, columns], layer.k, columns)
        weights = layer.router.weights(logits[:, columns], chosen, columns[chosen])
        removed = torch.ones(layer.n, dtype=torch.bool, device=logits.device).index_fill_(0, columns, False)
        return logits.masked_fill(removed, float("-inf")), weights, columns[chosen]

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
    n, cuts = layer.n, list(per_expert(layer.block, layer.gate, layer.n))
    cuts += [
        (layer.experts, name, 0)
        for name, tensor in layer.experts.named_parameters()
        if tensor.shape[0] == n and "." not in name
    ]
    for module, name, axis in cuts:
        tensor = getattr(module, name)
        rows = tensor.index_select(axis, torch.tensor(kept, device=tensor.device))
        setattr(module, name, nn.Parameter(rows, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else rows)
    for module in (layer.block, layer.experts, *layer.gate.modules()):
        for name in count_names(module, n):
            setattr(module, name, len(kept))
        if isinstance(module, nn.Linear):  # a gate, or within one
            module.out_features = len(kept)
    for found in ("_identified", "_leaving"):  # asked again of the smaller layer
        vars(layer).pop(found, None)
