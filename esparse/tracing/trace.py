"""The trace: one calibration pass, after which pruning and skipping are arithmetic.

For every token of a layer it keeps the router logits, the experts the token can reach in falling order of score, and
the Gram matrix of those experts' contributions. Changing the routing weights from w to w' moves the layer's output by
sum_i (w' - w)_i f_i, whose squared norm is (w' - w)^T G (w' - w): Eq. 3 for every subset, without running the model again.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import new_folder, read_json, write_json
from ..machine import everyone, summed
from ..moe.routers import Router, read_router, table_ranking

FORMAT = 5  # of saved traces


@dataclass
class LayerTrace:
    """One MoE layer on the calibration tokens.

    logits: [tokens, n] in the router's dtype, followed by `Router.extra_logits` others. order: [tokens, m] int64, the experts
    within reach, best first: the k chosen ones, then the others. The number n in `order` means no expert, which contributes 0:
    for a router with `idle`, and at the end where groups let a token reach fewer. For a router with `shared`, n comes last and
    means all shared experts together: their weight is the total minus the chosen experts' weights, so it changes when experts
    are removed.
    gram: [tokens, m (m + 1) / 2], <f_i, f_j> in `order`, upper triangle by rows, float64 for float64 models, else
    float32. A progressive trace compares with z, the layer's output on the original stream: target_dot [tokens, m] holds
    <f_i, z>, target_norm [tokens] ||z||^2. Without them z is the layer's own output.
    stream_norm: [tokens], ||h + z||^2 of the residual stream behind the decoder layer, in the same dtype; None for the trace
    of a block alone. stream_cosine: [tokens], cos(h, h + z) of the streams before the block and behind the layer; None also
    where no norm of the decoder layer stands before the router.
    length: tokens of a calibration sequence; the sequences follow one another. None for the trace of a block alone.
    counts: [tokens] float64, each token's weight in a mixture of corpora; `losses.mixed` has multiplied the inner products by
    it. None: 1 for each.
    """

    name: str
    k: int
    router: Router
    logits: Tensor
    order: Tensor
    gram: Tensor
    target_dot: Tensor | None = None
    target_norm: Tensor | None = None
    stream_norm: Tensor | None = None
    stream_cosine: Tensor | None = None
    keep: int | None = None  # the smallest r whose losses this trace tells
    split: bool = False  # whether other ranks of torch.distributed hold the other tokens
    length: int | None = None
    counts: Tensor | None = None

    def __post_init__(self):
        within = self.order.shape[1] - (self.router.extra_logits > 0)
        self.keep = self.n - (within - self.k) if self.keep is None else self.keep

    @property
    def n(self) -> int:
        return self.logits.shape[1] - self.router.extra_logits

    @cached_property
    def weights(self) -> Tensor:
        """Routing weights [tokens, k] of the full layer, as in `order`."""
        return self.router.weights(self.logits, self.order[:, : self.k])

    @property
    def token_counts(self) -> Tensor:
        """Each token's weight: `counts`, or ones; float64 [tokens]."""
        ones = torch.ones(len(self.order), dtype=torch.float64, device=self.order.device)
        return ones if self.counts is None else self.counts

    def check(self, kept: Sequence[int], losses: bool = True) -> list[int]:
        """The kept experts in rising order; ValueError if the router cannot keep them or, if `losses`, the trace does not reach
        as far."""
        kept = sorted(int(e) for e in kept)
        if len(set(kept)) != len(kept) or not kept or kept[0] < 0 or kept[-1] >= self.n:
            raise ValueError(f"Kept experts must be different numbers from 0 to {self.n - 1}, got {kept}.")
        self.check_size(len(kept), losses)
        size = self.n // self.router.groups
        if len({sum(e // size == group for e in kept) for group in range(self.router.groups)}) > 1:
            raise ValueError(f"Keep as many experts in each of the router's {self.router.groups} groups, got {kept}.")
        return kept

    def check_size(self, r: int, losses: bool = True) -> None:
        """ValueError if the router cannot keep r experts or, if `losses`, the trace does not reach as far."""
        check_experts(r, self.n, self.k, self.keep if losses else None, self.router)

    def choice(self, kept: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Each token's k experts and their weights in falling order, both [tokens, k], when only the experts `kept` exist
        (None: all). Logits alone tell it, whatever the trace's `keep`."""
        if kept is None:
            positions, weights = self.routing()
            return self.order.gather(1, positions), weights
        subset = torch.tensor([self.check(kept, losses=False)], device=self.order.device)
        experts, weights = self._choices(subset, self._places(beyond=subset.shape[1] < self.keep))
        return experts[:, 0], weights[:, 0]

    def routing(self, kept: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """`choice` with the experts as places in `order`."""
        if kept is None:
            return self._falling(torch.arange(self.k, device=self.order.device).expand(len(self.order), -1), self.weights)
        positions, weights = self.routings(torch.tensor([self.check(kept)], device=self.order.device))
        return positions[:, 0], weights[:, 0]

    def routings(self, subsets: Tensor) -> tuple[Tensor, Tensor]:
        """`routing` for subsets [s, r] at once: both [tokens, s, k]."""
        places = self._places()
        experts, weights = self._choices(subsets, places)
        return places.gather(1, experts.flatten(1)).view(weights.shape).long(), weights

    def _places(self, beyond: bool = False) -> Tensor:
        """Each expert's place in `order`, int32 [tokens, n + 1]. Those that a token does not reach are all at m; if `beyond`,
        from there on, by the router's ranking."""
        m = self.order.shape[1]
        places = torch.full((len(self.order), self.n + 1), m, dtype=torch.int32, device=self.order.device)
        if beyond:
            table, own = self.router.table, self.order[:, : self.k]
            ranking = table_ranking(own, self.n) if table else self.router.ranking(self.logits)
            places[:, : ranking.shape[1]] += ranking.argsort(1, descending=True).argsort(1)
        return places.scatter_(1, self.order, torch.arange(m, dtype=torch.int32, device=places.device).expand_as(self.order))

    def _choices(self, subsets: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """`choice` for subsets [s, r] at once, both [tokens, s, k]; places: from `_places`."""
        tokens, r, others = len(places), subsets.shape[1], torch.arange(self.n, self.logits.shape[1], device=places.device)
        columns = torch.cat([subsets, others.expand(len(subsets), -1)], 1)  # [s, r + extra logits]
        logits = self.logits[:, columns]  # [tokens, s, r + extra logits]
        places, m = places[:, columns[:, : r + self.router.idle]], self.order.shape[1]
        known = self.router.keeps_ranking or r == self.n
        ranking = -places if known else self.router.ranking(logits, columns).masked_fill(places == m, -math.inf)
        chosen = ranking.topk(self.k).indices.flatten(0, 1)  # [tokens * s, k]
        experts = columns.expand(tokens, -1, -1).flatten(0, 1).gather(1, chosen)
        weights = self.router.weights(logits.flatten(0, 1), chosen, experts).view(tokens, -1, self.k)
        return self._falling(experts.view(weights.shape), weights)

    def _falling(self, experts: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Both [..., k] sorted by falling weight."""
        if self.router.sorted:
            return experts, weights
        order = weights.argsort(dim=-1, descending=True, stable=True)
        return experts.gather(-1, order), weights.gather(-1, order)

    def tensors(self) -> dict[str, Tensor]:
        """The recorded tensors, by field."""
        return {field.name: value for field in fields(self) if torch.is_tensor(value := getattr(self, field.name))}

    def sum_over_ranks(self, total: Tensor) -> Tensor:
        """A sum over this trace's tokens; if it is split, over those of all ranks."""
        return summed(total) if self.split else total

    def over_ranks(self, values: Tensor) -> Tensor:
        """Values [tokens, ...] of this trace's tokens; if it is split, those of all ranks, in their order."""
        return torch.cat(everyone(values.cpu())).to(values.device) if self.split else values


def check_experts(r: int, n: int, k: int, keep: int | None = None, router: Router | None = None) -> None:
    """ValueError unless r experts can be kept: from k to n, equally many in each group of the router, and at least `keep`."""
    if not k <= r <= n:
        raise ValueError(f"Cannot keep {r} experts: a token is routed to {k} of {n}, so keep from {k} to {n}.")
    if router and router.groups > 1:
        each = r // router.groups
        if r % router.groups or each < router.group_size or each * router.top_groups < k:
            least = max(router.group_size, -(-k // router.top_groups))
            raise ValueError(
                f"Cannot keep {r} experts: the router's {router.groups} groups must keep equally many, at least {least}, "
                f"since tokens choose {k} from {router.top_groups} groups."
            )
    if keep is not None and r < keep:
        raise ValueError(f"This trace answers down to {keep} experts, not {r}: trace again with keep={r}.")


def check_beta(beta: float, k: int) -> None:
    """ValueError unless beta is a finite number >= 0 and k > 1."""
    if k == 1:
        raise ValueError("Nothing can be skipped: this model routes each token to one expert (k = 1).")
    if not (isinstance(beta, int | float) and 0 <= beta < float("inf")):
        raise ValueError(f"beta must be a finite number that is not negative, got {beta!r}.")


def part(layer: LayerTrace, tokens: Tensor | slice) -> LayerTrace:
    """The trace of some of the tokens alone, by their numbers."""
    return replace(layer, **{name: value[tokens] for name, value in layer.tensors().items()})


def parts(layer: LayerTrace, rows: int) -> Iterator[LayerTrace]:
    """The trace in consecutive parts of at most so many tokens."""
    if len(layer.order) <= rows:
        yield layer  # itself, whose `weights` are cached
        return
    for start in range(0, len(layer.order), rows):
        yield part(layer, slice(start, start + rows))


@dataclass
class Trace:
    """The traces of all MoE layers, the model's fingerprint and the digest of the calibration tokens."""

    layers: list[LayerTrace]
    model: str
    tokens: str

    @property
    def keep(self) -> int:
        return max(layer.keep for layer in self.layers)

    def save(self, folder: str | Path) -> None:
        """Write one safetensors file per layer and `trace.json`; raises FileExistsError if `folder` exists."""
        with new_folder(folder) as temporary:
            layers = [save_layer(layer, temporary / layer_file(number)) for number, layer in enumerate(self.layers)]
            write_about(temporary, self.model, self.tokens, layers)

    @classmethod
    def load(cls, folder: str | Path) -> "Trace":
        """Map what `save` wrote, so that a layer is read when it is used. Raises FileNotFoundError, or ValueError naming a
        truncated or foreign file."""
        folder = Path(folder)
        about = read_json(folder / "trace.json", "trace")
        if about.get("format") != FORMAT or not {"layers", "model", "tokens"} <= about.keys():
            raise ValueError(f"{folder} was saved by another version of esparse: trace again.")
        layers = [_load_layer(folder / layer_file(i), entry) for i, entry in enumerate(about["layers"])]
        return cls(layers, about["model"], about["tokens"])


def layer_file(number: int) -> str:
    """The name of an MoE layer's file in a saved trace."""
    return f"layer_{number:02d}.safetensors"


def save_layer(layer: LayerTrace, path: Path) -> dict:
    """Write a layer's tensors as they are in memory, so that reading can map them; returns its entry in `trace.json`."""
    tensors = {name: value.cpu().contiguous() for name, value in layer.tensors().items()}
    save_file(tensors, path)
    return {"name": layer.name, "k": layer.k, "keep": layer.keep, "length": layer.length, "router": asdict(layer.router)}


def write_about(folder: Path, model: str, tokens: str, layers: list[dict]) -> None:
    """Write `trace.json`, with the layers' entries from `save_layer`."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    about = {"format": FORMAT, "model": model, "tokens": tokens, "layers": layers, "versions": versions}
    write_json(folder / "trace.json", about)


def _load_layer(path: Path, about: dict) -> LayerTrace:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is missing or truncated ({error}): trace again.") from None
    tensors["order"] = tensors["order"].long()  # earlier versions wrote int16
    own = {"keep": about["keep"], "length": about["length"]}
    return LayerTrace(about["name"], about["k"], read_router(about["router"]), **own, **tensors)
