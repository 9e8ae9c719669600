"""The trace: one calibration pass, after which pruning and skipping are arithmetic.

For every token of a layer it keeps the router logits, the experts the token can reach in falling order of score, and
the Gram matrix of those experts' contributions. Changing the routing weights from w to w' moves the layer's output by
sum_i (w' - w)_i f_i, whose squared norm is (w' - w)^T G (w' - w): Eq. 3 for every subset, without running the model again.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..files import new_folder, read_json, write_json
from ..machine import everyone, summed
from ..moe.routers import Router, read_router

FORMAT = 3  # of saved traces


def reach(n: int, k: int, keep: int | None, router: Router) -> int:
    """How many best-ranked experts a token can reach when at least `keep` of n stay: min(n, k + n - keep).

    All n where removing experts changes the ranking of the others (groups; a bias added to a softmax). With `extra_logits`,
    one more: the extra entry of `LayerTrace.order`.
    """
    return (min(n, k + n - (k if keep is None else keep)) if router.keeps_ranking else n) + (router.extra_logits > 0)


@dataclass
class LayerTrace:
    """One MoE layer on the calibration tokens.

    logits: [tokens, n] in the router's dtype, followed by `Router.extra_logits` others. order: [tokens, m] int64, the experts
    within reach, best first: the k chosen ones, then the others. For a router with `idle`, the number n in `order` means no
    expert, which contributes 0. For one with `shared`, n comes last and means all shared experts together: their weight is the
    total minus the chosen experts' weights, so it changes when experts are removed.
    gram: [tokens, m (m + 1) / 2], <f_i, f_j> in `order`, upper triangle by rows, float64 for float64 models, else
    float32. A progressive trace compares with z, the layer's output on the original stream: target_dot [tokens, m] holds
    <f_i, z>, target_norm [tokens] ||z||^2. Without them z is the layer's own output.
    """

    name: str
    k: int
    router: Router
    logits: torch.Tensor
    order: torch.Tensor
    gram: torch.Tensor
    target_dot: torch.Tensor | None = None
    target_norm: torch.Tensor | None = None
    keep: int | None = None  # the smallest r this trace can answer for
    split: bool = False  # whether other ranks of torch.distributed hold the other tokens

    def __post_init__(self):
        within = self.order.shape[1] - (self.router.extra_logits > 0)
        self.keep = self.n - (within - self.k) if self.keep is None else self.keep

    @property
    def n(self) -> int:
        return self.logits.shape[1] - self.router.extra_logits

    @cached_property
    def weights(self) -> torch.Tensor:
        """Routing weights [tokens, k] of the full layer, as in `order`."""
        return self.router.weights(self.logits, self.order[:, : self.k])

    def check(self, kept: Sequence[int]) -> list[int]:
        """The kept experts in rising order; ValueError if they are no subset this trace can answer for."""
        kept = sorted(int(e) for e in kept)
        if len(set(kept)) != len(kept) or not kept or kept[0] < 0 or kept[-1] >= self.n:
            raise ValueError(f"Kept experts must be different numbers from 0 to {self.n - 1}, got {kept}.")
        self.check_size(len(kept))
        size = self.n // self.router.groups
        if len({sum(e // size == group for e in kept) for group in range(self.router.groups)}) > 1:
            raise ValueError(f"Keep as many experts in each of the router's {self.router.groups} groups, got {kept}.")
        return kept

    def check_size(self, r: int) -> None:
        """ValueError if the router cannot keep r experts, or the trace does not answer for r."""
        check_experts(r, self.n, self.k, self.keep, self.router)

    def routing(self, kept: Sequence[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Each token's k experts as places in `order`, and their weights in falling order, both [tokens, k], when only the
        experts `kept` exist (None: all)."""
        if kept is None:
            return self._falling(torch.arange(self.k, device=self.order.device).expand(len(self.order), -1), self.weights)
        positions, weights = self.routings(torch.tensor([self.check(kept)], device=self.order.device))
        return positions[:, 0], weights[:, 0]

    def routings(self, subsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`routing` for subsets [s, r] at once: both [tokens, s, k]."""
        if not self.router.keeps_ranking:
            routed = [self._routing_anew(subset) for subset in subsets]
            return tuple(torch.stack(column, 1) for column in zip(*routed, strict=True))
        (s, r), (tokens, m), device = subsets.shape, self.order.shape, self.order.device
        columns = torch.arange(r, device=device).expand(s, -1)
        column = torch.full((s, self.n + 1), -1, device=device).scatter_(1, subsets, columns).T.contiguous()  # [n + 1, s]
        local = column.index_select(0, self.order.flatten()).view(tokens, m, s)  # a kept expert's column, or -1
        alive = local >= 0
        counted = alive.to(torch.int16)  # int16: less memory to move
        place = counted.cumsum(1, dtype=torch.int16).mul_(counted).clamp_(max=self.k + 1).long()  # 1..k, else 0 or k + 1
        ranks = torch.arange(m, device=device)[:, None].expand_as(place)
        positions = ranks.new_zeros(tokens, self.k + 2, s).scatter_(1, place, ranks)[:, 1:-1]  # `reach` ensures k each
        chosen = local.gather(1, positions).mT.reshape(-1, self.k)
        numbers = self.order.gather(1, positions.mT.flatten(1)).view(-1, self.k) if self.router.expert_scale else None
        logits = self.logits.index_select(1, subsets.flatten()).view(-1, r)  # [tokens * s, r]
        if self.router.extra_logits:
            logits = torch.cat([logits, self.logits[:, self.n :].repeat_interleave(s, 0)], 1)
        return self._falling(positions.mT, self.router.weights(logits, chosen, numbers).view(tokens, s, self.k))

    def _routing_anew(self, subset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`routing` where removing experts changes the ranking of the others: the router chooses again."""
        subset = torch.cat([subset, torch.arange(self.n, self.logits.shape[1], device=subset.device)])
        logits = self.logits[:, subset]
        chosen = self.router.ranking(logits, subset).topk(self.k).indices
        weights = self.router.weights(logits, chosen, subset[chosen])
        return self._falling(self.order.argsort(1).gather(1, subset[chosen]), weights)

    def _falling(self, positions: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both [..., k] sorted by falling weight."""
        if self.router.sorted:
            return positions, weights
        order = weights.argsort(dim=-1, descending=True, stable=True)
        return positions.gather(-1, order), weights.gather(-1, order)

    def sum_over_ranks(self, total: torch.Tensor) -> torch.Tensor:
        """A sum over this trace's tokens; if it is split, over those of all ranks."""
        return summed(total) if self.split else total

    def over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Values [tokens, ...] of this trace's tokens; if it is split, those of all ranks, in their order."""
        if not self.split:
            return values
        found = [value for part in everyone(values.tolist()) for value in part]
        return torch.tensor(found, dtype=values.dtype, device=values.device)


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


def part(layer: LayerTrace, tokens: torch.Tensor | slice) -> LayerTrace:
    """The trace of some of the tokens alone, by their numbers."""
    cut = {name: value[tokens] for name, value in vars(layer).items() if torch.is_tensor(value) and name != "weights"}
    return LayerTrace(layer.name, layer.k, layer.router, keep=layer.keep, **cut)


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
            for number, layer in enumerate(self.layers):
                save_layer(layer, temporary / layer_file(number))
            write_about(temporary, self.model, self.tokens, [about_layer(layer) for layer in self.layers])

    @classmethod
    def load(cls, folder: str | Path) -> "Trace":
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError naming a truncated or foreign file."""
        folder = Path(folder)
        about = read_json(folder / "trace.json", "trace")
        if about.get("format") != FORMAT or not {"layers", "model", "tokens"} <= about.keys():
            raise ValueError(f"{folder} was saved by another version of esparse: trace again.")
        layers = [_load_layer(folder / layer_file(i), entry) for i, entry in enumerate(about["layers"])]
        return cls(layers, about["model"], about["tokens"])


def layer_file(number: int) -> str:
    """The name of an MoE layer's file in a saved trace."""
    return f"layer_{number:02d}.safetensors"


def save_layer(layer: LayerTrace, path: Path) -> None:
    tensors = {name: value.cpu().contiguous() for name, value in vars(layer).items() if torch.is_tensor(value)}
    tensors.pop("weights", None)  # a cached property
    tensors["order"] = tensors["order"].to(torch.int16)
    save_file(tensors, path)


def about_layer(layer: LayerTrace) -> dict:
    """The entry of a layer in `trace.json`."""
    return {"name": layer.name, "k": layer.k, "keep": layer.keep, "router": asdict(layer.router)}


def write_about(folder: Path, model: str, tokens: str, layers: list[dict]) -> None:
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    about = {"format": FORMAT, "model": model, "tokens": tokens, "layers": layers, "versions": versions}
    write_json(folder / "trace.json", about)


def _load_layer(path: Path, about: dict) -> LayerTrace:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is missing or truncated ({error}): trace again.") from None
    tensors["order"] = tensors["order"].long()
    return LayerTrace(about["name"], about["k"], read_router(about["router"]), keep=about["keep"], **tensors)
