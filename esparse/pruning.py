"""Choosing the experts to keep (Section 3.2), acting as if pruned, and pruning."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from .files import read_json, refuse_existing, write_json
from .models import COUNT_NAMES, MoELayer, Scratch, check_fingerprint, check_tokens, decoder_layers, moe_layers
from .routers import unpack
from .traces import (
    CHUNK_TOKENS,
    LayerTrace,
    Recorder,
    Trace,
    check_experts,
    reconstruction_loss,
    recording,
    selection_frequency,
    tokens_digest,
)

MAX_SUBSETS = 200_000


@dataclass
class PruningPlan:
    """Which experts each layer keeps, in rising order, and what that costs.

    losses: the reconstruction loss (Eq. 3) of each layer's choice on the calibration set; runner_up: that of the second
    best subset, where all were tried. model and tokens name what the plan was made from.
    """

    method: str
    r: int
    kept: list[list[int]]
    losses: list[float]
    model: str
    tokens: str
    runner_up: list[float] | None = None

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; raises FileExistsError if `path` exists."""
        write_json(refuse_existing(path), asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "PruningPlan":
        return cls(**read_json(path, "pruning plan"))


def subset_losses(layer: LayerTrace, r: int) -> tuple[list[tuple[int, ...]], torch.Tensor]:
    """Every subset of r experts and its reconstruction loss, float64 [subsets] (Eq. 3, the whole landscape).

    Raises ValueError where r is out of range, or the subsets are too many to enumerate.
    """
    check_experts(r, layer.n, layer.k, layer.keep)
    count = math.comb(layer.n, r)
    if count > MAX_SUBSETS:
        raise ValueError(f"{count:.2g} subsets of {r} out of {layer.n} experts are too many to enumerate: use method='greedy'.")
    subsets = list(itertools.combinations(range(layer.n), r))
    return subsets, layer.losses(subsets)


def _greedy(layer: LayerTrace, r: int, _generator) -> list[int]:
    """Remove the expert whose removal costs least, again and again."""
    check_experts(r, layer.n, layer.k, layer.keep)
    kept = list(range(layer.n))
    while len(kept) > r:
        candidates = [[e for e in kept if e != out] for out in kept]
        kept = candidates[int(layer.losses(candidates).argmin())]
    return kept


def _frequency(layer: LayerTrace, r: int, _generator) -> list[int]:
    """The r experts chosen most often (the paper's frequency baseline)."""
    return selection_frequency(layer).argsort(descending=True, stable=True)[:r].tolist()


def _random(layer: LayerTrace, r: int, generator: torch.Generator) -> list[int]:
    return torch.randperm(layer.n, generator=generator)[:r].tolist()


METHODS: dict[str, Callable[[LayerTrace, int, torch.Generator], list[int]]] = {
    "greedy": _greedy,
    "frequency": _frequency,
    "random": _random,
}


def search_experts(
    trace: Trace, r: int, *, method: str = "enumerate", model=None, tokens: torch.Tensor | None = None, seed: int = 0
) -> PruningPlan:
    """Choose r experts to keep in every layer.

    method: "enumerate" (Eq. 3, exact, layer by layer), "progressive" (Table 6: each layer is searched on what the
    already pruned layers feed it; needs `model` and the `tokens` of the trace), "greedy", "frequency", "random"
    (drawn from `seed`). Raises ValueError for r out of range, an unknown method, or a model that is not the trace's.
    """
    for layer in trace.layers:
        check_experts(r, layer.n, layer.k, layer.keep)
    if method == "progressive":
        return _progressive_plan(trace, r, model, tokens)
    if method not in ("enumerate", *METHODS):
        raise ValueError(f"Unknown method {method!r}: choose from {', '.join(['enumerate', *METHODS, 'progressive'])}.")
    layers = tqdm(trace.layers, desc=method, unit="layer", leave=False)
    if method == "enumerate":
        return _plan(method, r, [best_subset(layer, r) for layer in layers], trace)
    generator = torch.Generator().manual_seed(seed)
    kept = [sorted(METHODS[method](layer, r, generator)) for layer in layers]
    losses = [reconstruction_loss(layer, subset) for layer, subset in zip(trace.layers, kept, strict=True)]
    return PruningPlan(method, r, kept, losses, trace.model, trace.tokens)


def best_subset(layer: LayerTrace, r: int) -> tuple[list[int], float, float]:
    """The subset of r experts with the smallest loss, that loss, and the runner-up's (the same where there is none)."""
    subsets, losses = subset_losses(layer, r)
    best = losses.argsort(stable=True)[:2].tolist()
    return list(subsets[best[0]]), losses[best[0]].item(), losses[best[-1]].item()


def _plan(method: str, r: int, found: list[tuple[list[int], float, float]], trace: Trace) -> PruningPlan:
    kept, losses, runner_up = (list(column) for column in zip(*found, strict=True))
    return PruningPlan(method, r, kept, losses, trace.model, trace.tokens, runner_up)


# --- progressive search ---------------------------------------------------------------------------------------------


@torch.no_grad()
def _progressive_plan(trace: Trace, r: int, model, tokens: torch.Tensor | None) -> PruningPlan:
    if model is None or tokens is None:
        raise ValueError("method='progressive' runs the model again: pass model= and the tokens= of the trace.")
    check_fingerprint(model, trace.model, "trace")
    check_tokens(model, tokens)
    if tokens_digest(tokens) != trace.tokens:
        raise ValueError("These are not the tokens the trace was made from: pass the same calibration set.")
    walk = _Walk(model, tokens)
    by_block = {id(layer.block): layer for layer in moe_layers(model)}
    found = []
    for decoder in tqdm(decoder_layers(model), desc="progressive", unit="layer", leave=False):
        layer = next((by_block[id(m)] for m in decoder.modules() if id(m) in by_block), None)
        found += walk.through(decoder, layer, r)
    return _plan("progressive", r, found, trace)


class _Walk:
    """Two streams of hidden states through the decoder: the original model's, and that of the layers pruned so far."""

    def __init__(self, model, tokens: torch.Tensor, batch_size: int = 8):
        self.model = model
        self.original, self.arguments = [], []
        for batch in tokens.split(batch_size):
            hidden_states, arguments = _layer_inputs(model, batch.to(model.device))
            self.original.append(hidden_states)
            self.arguments.append(arguments)
        self.pruned = list(self.original)
        self.depth = 0
        self.scratch = Scratch()

    def _advance(self, decoder: nn.Module, stream: list[torch.Tensor]) -> list[torch.Tensor]:
        outputs = [decoder(h, **a[self.depth]) for h, a in zip(stream, self.arguments, strict=True)]
        return [o[0] if isinstance(o, tuple) else o for o in outputs]

    def through(self, decoder: nn.Module, layer: MoELayer | None, r: int) -> list[tuple[list[int], float, float]]:
        """Both streams past one decoder layer; what was found for it, or nothing where it has no experts."""
        targets, found = [], []
        hook = layer and layer.block.register_forward_hook(lambda m, i, out: targets.append(out.flatten(0, -2)))
        original = self._advance(decoder, self.original)
        if layer is None:
            self.pruned = self._advance(decoder, self.pruned)
        else:
            hook.remove()
            recorder = Recorder(layer, r, CHUNK_TOKENS, self.scratch, iter(targets))
            with recording(self.model, [recorder]):
                self._advance(decoder, self.pruned)
            found = [best_subset(recorder.finish(), r)]
            with masked_layer(layer, found[0][0]):
                self.pruned = self._advance(decoder, self.pruned)
        self.original = original
        self.depth += 1
        return found


def _layer_inputs(model, batch: torch.Tensor) -> tuple[torch.Tensor, list[dict]]:
    """The hidden states entering the first decoder layer, and the other arguments each layer is called with."""
    calls = []

    def note(_module, args, kwargs):
        calls.append((args[0] if args else kwargs["hidden_states"], {k: v for k, v in kwargs.items() if k != "hidden_states"}))

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in decoder_layers(model)]
    try:
        model.base_model(batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls[0][0], [kwargs for _, kwargs in calls]


# --- masking and pruning --------------------------------------------------------------------------------------------


def _masking_hook(layer: MoELayer, kept: list[int]):
    """Gate hook: what the gate would return had it only the kept experts, under their old numbers."""

    def hook(gate, _inputs, output):
        logits, _, _ = unpack(output)
        columns = torch.tensor(kept, device=logits.device)
        chosen = layer.router.scores(logits[:, columns]).topk(layer.k).indices
        weights = layer.router.weights(logits[:, columns], chosen)
        removed = torch.ones(layer.n, dtype=torch.bool, device=logits.device).index_fill_(0, columns, False)
        return logits.masked_fill(removed, float("-inf")), weights, columns[chosen]

    return hook


@contextmanager
def masked_layer(layer: MoELayer, kept: Sequence[int]) -> Iterator[None]:
    handle = layer.gate.register_forward_hook(_masking_hook(layer, list(kept)))
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
        check_experts(len(kept), layer.n, layer.k)
        if len(kept) != plan.r or sorted(set(kept)) != list(kept) or kept[0] < 0 or kept[-1] >= layer.n:
            raise ValueError(f"{layer.name}: the plan must keep {plan.r} different experts in rising order, got {kept}.")
    return layers


@contextmanager
def masked(model, plan: PruningPlan) -> Iterator[None]:
    """The model as if pruned: removed experts are taken out of the routing, no weight is copied or changed.

    Raises ValueError for a plan made with another model.
    """
    with ExitStack() as stack:
        for layer, kept in zip(_check_plan(model, plan), plan.kept, strict=True):
            stack.enter_context(masked_layer(layer, kept))
        yield


@torch.no_grad()
def prune(model, plan: PruningPlan):
    """Remove the experts outside the plan, in place, and return the model: an ordinary one with fewer experts.

    Everything is checked before anything changes. One layer is copied at a time. Raises ValueError for a plan made
    with another model.
    """
    layers = _check_plan(model, plan)
    for layer, kept in zip(layers, plan.kept, strict=True):
        for module in (layer.gate, layer.experts):
            _keep_rows(module, layer.n, kept)
    for holder in (model, model.base_model, model.config, *(layer.block for layer in layers)):
        for name in COUNT_NAMES:  # a stale count breaks the balance loss, or the next reload
            if getattr(holder, name, None) == layers[0].n:
                setattr(holder, name, plan.r)
    return model


def _keep_rows(module: nn.Module, n: int, kept: list[int]) -> None:
    """Cut every tensor of a module that is indexed by expert to the kept rows, and the module's own count."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.shape[0] == n:
            rows = parameter[torch.tensor(kept, device=parameter.device)].clone()
            setattr(module, name, nn.Parameter(rows, requires_grad=parameter.requires_grad))
    module.num_experts = len(kept)
