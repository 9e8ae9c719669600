"""The numbers that the sliders show, computed from traces once, then looked up: of small traces all on the sliders' grid when
they are opened, of others a layer when it is looked at."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..files import checkout, digest, made_once, read_json, write_json
from ..measure.decoding import decoding_rows, results
from ..measure.timing import MIXTRAL_8X7B
from ..pruning.mixture import layer_mixtures
from ..pruning.plan import PruningPlan
from ..pruning.scores import EXPERT_SCORES, available_scores, ranked
from ..pruning.search import affordable, choose_experts, subset_losses
from ..tracing.losses import losses_of, output_norm, skip_curve, weighed
from ..tracing.statistics import betas_of_shares, co_selection
from ..tracing.trace import LayerTrace, Trace
from .views import VIEWS

BETAS = [i / 100 for i in range(101)]  # for two experts a token; see `beta_grid`
SHARES = [i / 20 for i in range(21)]
FORMAT = 9  # a stored grid of another format is computed again
POINTS = 200  # at most, of a loss landscape
WHOLE = 2**23  # numbers in all Gram matrices; up to this, the whole grid is computed at first
ENUMERABLE = 5000  # subsets of a layer; with more, no landscape is drawn
MIXTRAL = MIXTRAL_8X7B | {"name": "Mixtral 8x7B", "num_local_experts": 8, "num_experts_per_tok": 2}


def beta_grid(k: int) -> list[float]:
    """The betas on the grid, up to k - 1: that beta drops every droppable pair."""
    return BETAS if k == 2 else [i / 20 for i in range(20 * (k - 1) + 1)]


def _row(layer: LayerTrace, kept: Sequence[int], norm: float) -> dict:
    """A subset's losses by pruning alone, and for each kind of `Choice.skip` its betas, and for each beta the share dropped and
    the relative loss."""
    ratios, squares = skip_curve(layer, kept)
    loss = squares[0].sqrt().item()
    aimed = betas_of_shares(ratios, SHARES) if layer.k > 1 else [0.0] * len(SHARES)
    found = {"kept": kept, "eq3": loss, "relative": loss / norm}
    for kind, betas in (("share", aimed), ("betas", beta_grid(layer.k))):
        places = torch.searchsorted(ratios, torch.tensor(betas, dtype=torch.float64))  # drops pairs with a ratio below beta
        found[f"{kind} beta"] = betas
        found[f"{kind} dropped"] = (places / max(1, len(ratios))).tolist()
        found[f"{kind} loss"] = (squares[places].sqrt() / norm).tolist()
    return found


def _landscape(layer: LayerTrace, r: int, norm: float) -> tuple[dict, dict[tuple[int, ...], int]]:
    """The relative losses of all subsets of r, best first, thinned to `POINTS`, and the number of subsets besides one's own;
    for each subset, the number of better ones. Empty if every expert stays or there are too many subsets."""
    if r == layer.n or math.comb(layer.n, r) > ENUMERABLE:
        return {"losses": [], "others": 0}, {}
    subsets, losses = subset_losses(layer, r)
    order, last = ranked(losses), len(losses) - 1
    shown = order[torch.linspace(0, last, min(POINTS, last + 1)).round().long()]
    better = {subsets[at]: place for place, at in enumerate(order.tolist())}
    return {"losses": (losses[shown] / norm).tolist(), "others": last}, better


def _best_of_mixtures(layers: Sequence[LayerTrace], r: int, mixes: Sequence[float]) -> list[tuple[int, ...]]:
    """The best subset of a layer for every pair of `SHARES` of the residual loss and `mixes`, shares of the second corpus.

    layers: its traces on both corpora. The squared losses per token of the corpora are mixed first; then those of Eq. 3 and of
    the residual loss, each divided by the squared norm of the layer's output, which the same loss measures on the same mixture.
    """
    found, best = [layer_mixtures(layers, r, loss) for loss in ("eq3", "residual")], []
    corpora = found[0].norms.new_tensor([[1 - mix, mix] for mix in mixes])
    eq3, relative = (corpora @ one.squares.T / (corpora @ one.norms)[:, None] for one in found)  # [mixes, subsets]
    for residual in SHARES:
        first = ranked(((1 - residual) * eq3 + residual * relative).sqrt())[:, 0].tolist()
        best += [found[0].subsets[number] for number in first]
    return best


class Grid:
    """The numbers of one or two traces of a model. A layer's numbers for a choice are computed when first asked, and kept.

    data: for each trace, ready for JSON: for each r and layer the loss landscape, and the losses and skipping of the subsets
    that some choice keeps (`rows`); for each choice the number of its row in each layer (`places`); for each layer
    co-selection; and the largest values (`most`). What is not computed yet is None.
    """

    def __init__(self, traces: Sequence[Trace]):
        first, self.layers, sizes = traces[0].layers[0], len(traces[0].layers), _sizes(traces[0])
        # Greedy removal finds nearly the same as enumeration. The other methods that need a model are left out.
        exact = affordable(first, (first.n + first.k) // 2)
        methods = ["enumerate" if exact else "greedy", *available_scores(traces[0]), "random"]
        self.traces, self.data = traces, []
        for one in traces:
            about = {"n": first.n, "k": first.k, "model": one.model, "tokens": one.tokens, "methods": methods, "sizes": sizes}
            about["rows"] = {str(r): [[] for _ in one.layers] for r in sizes}
            about["landscape"] = {str(r): [None] * self.layers for r in sizes}
            about |= {"co_selection": [None] * self.layers, "places": {}}
            self.data.append(about | {"most": dict.fromkeys(("pairs", "landscape", "loss"), 0.0)})
        self.mixes = SHARES if len(traces) == 2 else [0.0]
        self._layer = lru_cache(maxsize=len(traces))(self._read_layer)
        self._best = lru_cache(maxsize=1024)(self._enumerate)
        self._better = lru_cache(maxsize=64)(self._rank)

    def compute(self, choice: "Choice", number: int) -> None:
        """All that the pictures of a choice show of one layer."""
        for corpus, one in enumerate(self.data):
            self.co_selection(corpus, number)
            places = one["places"].setdefault(_key(choice), [None] * self.layers)
            if places[number] is None:
                kept, rows = self._chosen(corpus, choice, number), one["rows"][str(choice.r)][number]
                if not any(row["kept"] == kept for row in rows):
                    rows.append(self._computed(corpus, choice.r, number, kept))
                places[number] = [row["kept"] for row in rows].index(kept)  # another thread may append, too

    def fill(self) -> list[dict]:
        """`data` with all choices on the grid."""
        for r, number in itertools.product(tqdm(self.data[0]["sizes"], desc="explorer", unit="size"), range(self.layers)):
            for method in self.data[0]["methods"]:
                for choice in self._mixtures(r) if method == "enumerate" else [Choice(r, method)]:
                    self.compute(choice, number)
        return self.data

    def co_selection(self, corpus: int, number: int) -> list[list[float]]:
        """How often two experts of a layer are chosen together."""
        tables, most = (self.data[corpus][key] for key in ("co_selection", "most"))
        if tables[number] is None:
            table = co_selection(replace(self.traces[corpus].layers[number])).fill_diagonal_(0)
            most["pairs"] = max(most["pairs"], table.max().item())
            tables[number] = table.tolist()
        return tables[number]

    def _read_layer(self, corpus: int, number: int) -> tuple[LayerTrace, LayerTrace, float]:
        """A layer of a trace, the same weighed by the residual loss, and the norm of its output. Its weights, which a layer
        caches, go with the copy."""
        layer = replace(self.traces[corpus].layers[number])
        return layer, weighed(layer, "residual"), output_norm(layer)

    def _mixtures(self, r: int, own: Sequence[float] | None = None) -> Iterator["Choice"]:
        """All choices by enumeration, for these shares of the other corpus."""
        for residual, mix in itertools.product(SHARES, own or self.mixes):
            yield Choice(r, "enumerate", mix=mix, residual=residual)

    def _enumerate(self, r: int, number: int) -> list[dict[str, tuple[int, ...]]]:
        """For each trace, the experts that enumeration keeps in a layer, by `_key` of the choice."""
        best = _best_of_mixtures([self.traces[at].layers[number] for at in (0, -1)], r, self.mixes)
        both = (self.mixes, self.mixes[::-1])[: len(self.traces)]  # what is one corpus's share is the rest for the other
        return [dict(zip(map(_key, self._mixtures(r, own)), best, strict=True)) for own in both]

    def _chosen(self, corpus: int, choice: "Choice", number: int) -> list[int]:
        """The experts that a choice keeps in a layer; all methods but enumeration go by the residual loss."""
        if choice.method == "enumerate":
            return list(self._best(choice.r, number)[corpus][_key(choice)])
        layer, generator = self._layer(corpus, number)[1], torch.Generator().manual_seed(0)
        torch.rand(number, layer.n, generator=generator)  # drawn for the layers before
        return choose_experts(layer, choice.r, choice.method, generator)

    def _rank(self, corpus: int, r: int, number: int) -> dict[tuple[int, ...], int]:
        """For each subset of a layer the number of better ones; notes the landscape."""
        layer, _, norm = self._layer(corpus, number)
        self.data[corpus]["landscape"][str(r)][number], better = _landscape(layer, r, norm)
        return better

    def _computed(self, corpus: int, r: int, number: int, kept: list[int]) -> dict:
        """The row of a subset."""
        layer, relative, norm = self._layer(corpus, number)
        row = _row(layer, kept, norm) | {"better": self._better(corpus, r, number).get(tuple(kept), 0)}
        most, losses = self.data[corpus]["most"], self.data[corpus]["landscape"][str(r)][number]["losses"]
        most["landscape"] = max([most["landscape"], row["relative"], *losses])
        most["loss"] = max(most["loss"], row["relative"], *row["share loss"], *row["betas loss"])
        return row | {"residual": losses_of(relative, [kept]).item()}


def _sizes(trace: Trace) -> list[int]:
    """Up to eight sizes below n for which the trace is valid, rising, evenly spaced up to n; then n."""
    first, valid = trace.layers[0], []
    for r in range(trace.keep, first.n):
        with suppress(ValueError):  # the router's groups may forbid this size
            first.check_size(r)
            valid.append(r)
    step = max(1, -(-len(valid) // 8))
    return [*valid[-step::-step][::-1], first.n]


def _stored(grid: Grid, folder: Path) -> list[dict]:
    """The data of the whole grid; computed once, then read."""
    first, sums = grid.traces[0], lambda one: [layer.gram.double().sum().item() for layer in one.layers]
    key = [[one.tokens, sums(one)] for one in grid.traces]
    path = folder / f"{digest('explorer', FORMAT, list(EXPERT_SCORES), first.model, first.keep, key)}.json"
    return read_json(made_once(path, lambda path: write_json(path, grid.fill())), "explorer's grid")


@dataclass(frozen=True)
class Choice:
    """The values of the controls. skip: ("betas", a beta of `beta_grid` for each layer) or ("share", one of `SHARES`).

    mix, residual: one of `SHARES`, for the method "enumerate" alone. mix: the other corpus's share of the calibration, from 0,
    each corpus's own choice, to 1, the other's. residual: from 0, Eq. 3, to 1, the loss relative to the residual stream.
    """

    r: int
    method: str
    layer: int = 0
    skip: tuple = ("share", 0.0)
    mix: float = 0.0
    residual: float = 1.0


class Explorer:
    """The numbers and words of one or two traces of a model at every `Choice`.

    traces: `Trace`s or their folders, by the name of their corpus. folder: where grids are stored.
    model: its name on the command line. shape: the Mixtral for `estimate`: its sizes, named as in its config, and its `name`.
    Raises ValueError, or FileNotFoundError, for traces that cannot be read or do not belong together.
    """

    def __init__(self, traces: Mapping, folder: str | Path | None = None, model: str = "MODEL", shape: Mapping = MIXTRAL):
        if not 1 <= len(traces) <= 2:
            raise ValueError(f"The explorer shows one trace, or two side by side, got {len(traces)}.")
        read = {name: one if isinstance(one, Trace) else Trace.load(one) for name, one in traces.items()}
        if not all(one.layers for one in read.values()):
            raise ValueError("This trace holds no MoE layer: trace again.")
        if len({(one.model, len(one.layers), one.keep) for one in read.values()}) > 1:
            raise ValueError("These traces are of different models or sizes, and cannot stand side by side.")
        self.grid, layers = Grid([*read.values()]), [layer for one in read.values() for layer in one.layers]
        self.whole = sum(layer.gram.numel() for layer in layers) <= WHOLE
        if self.whole:
            self.grid.data = _stored(self.grid, Path(folder) if folder else checkout() / ".runs" / "explorer")
        self.grids = dict(zip(read, self.grid.data, strict=True))
        self.model, self.shape = model, shape
        self.first = next(iter(self.grids))
        first = self.grids[self.first]
        self.n, self.k, self.sizes, self.methods = (first[key] for key in ("n", "k", "sizes", "methods"))
        self.layers, self.betas = self.grid.layers, beta_grid(self.k)

    @property
    def default(self) -> Choice:
        """Three quarters of the experts, kept by enumeration (else greedy), and half of the droppable pairs skipped."""
        return Choice(min(self.sizes, key=lambda r: abs(r - 0.75 * self.n)), self.methods[0], 0, ("share", 0.5))

    @property
    def note(self) -> str:
        """A sentence on what this trace cannot show."""
        if self.k == 1:
            return "Each token is routed to one expert here: nothing can be skipped."
        return "This trace has one MoE layer: views over layers show a single column." if self.layers == 1 else ""

    def missing(self, choice: Choice) -> list[int]:
        """The layers whose numbers are not computed for a choice."""
        places = [one["places"].get(_key(choice), [None] * self.layers) for one in self.grids.values()]
        return [layer for layer, some in enumerate(zip(*places, strict=True)) if None in some]

    def compute(self, choice: Choice, layers: Sequence[int] | None = None) -> None:
        """Compute what is missing of some layers (None: of all), for all views of a choice."""
        for layer in range(self.layers) if layers is None else layers:
            self.grid.compute(choice, layer)

    def _rows(self, name: str, choice: Choice) -> list[dict | None]:
        """The losses and skipping of the chosen subsets, by layer; None where they are not computed."""
        one, unknown = self.grids[name], [None] * self.layers
        places = zip(one["rows"][str(choice.r)], one["places"].get(_key(choice), unknown), strict=True)
        return [None if at is None else rows[at] for rows, at in places]

    def kept(self, name: str, choice: Choice) -> list[list[int]]:
        """The experts kept in each layer; none where that is not computed."""
        return [row["kept"] if row else [] for row in self._rows(name, choice)]

    def skipping(self, name: str, choice: Choice) -> dict[str, list[float]]:
        """For each layer: beta, the share of droppable pairs that it drops, and the loss divided by the output's norm; nan
        where they are not computed."""
        (kind, value), rows, found = choice.skip, self._rows(name, choice), {}
        at = [SHARES.index(value)] * self.layers if kind == "share" else [self.betas.index(beta) for beta in value]
        for key in ("beta", "dropped", "loss"):
            found[key] = [row[f"{kind} {key}"][i] if row else math.nan for row, i in zip(rows, at, strict=True)]
        return found

    def _means(self, name: str, choice: Choice) -> list[float]:
        """The share dropped and the loss, means over the computed layers."""
        now = self.skipping(name, choice)
        return [_mean(now[key]) for key in ("dropped", "loss")]

    def co_selection(self, name: str, choice: Choice) -> list[list[float]]:
        return self.grid.co_selection([*self.grids].index(name), choice.layer)

    def landscape(self, name: str, choice: Choice) -> dict:
        """The losses of all subsets and of the chosen one; the number of `others`, and of those that are `better`."""
        row = self._rows(name, choice)[choice.layer] or {"better": math.nan, "relative": math.nan}
        landscape = self.grids[name]["landscape"][str(choice.r)][choice.layer] or {"losses": [], "others": 0}
        return landscape | {"better": row["better"], "loss": row["relative"]}

    def trade_off(self, name: str, choice: Choice) -> dict[str, list[float]]:
        """The share dropped and the loss, means over the computed layers, for each of `SHARES`; and now."""
        rows, found = [row for row in self._rows(name, choice) if row], {}
        for key in ("dropped", "loss"):
            found[key] = [_mean(values) for values in zip(*(row[f"share {key}"] for row in rows), strict=True)]
        return found | {"now": self._means(name, choice)}

    @property
    def frame(self) -> dict:
        """The names and ranges of the axes. They do not change with the choice, so that two pictures can be compared. Where not
        all is computed, they are those of what is, up to the next power of two."""
        most = {key: max(one["most"][key] for one in self.grids.values()) for key in ("pairs", "landscape", "loss")}
        if not self.whole:
            most = {key: value and 2.0 ** math.ceil(math.log2(value)) for key, value in most.items()}
        return {"n": self.n, "k": self.k, "layers": self.layers, "corpora": list(self.grids)} | most

    def view(self, name: str, choice: Choice) -> dict:
        """The numbers of one of `VIEWS`: for each corpus, what the method of that name returns."""
        key = {"kept": "kept", "co_selection": "tables"}.get(name, "corpora")  # as in figures/11_explorer.json
        return {key: {corpus: getattr(self, name)(corpus, choice) for corpus in self.grids}}

    def snapshot(self, choice: Choice) -> dict:
        """The data and titles of all `VIEWS`, as the figure 11_explorer draws them."""
        self.compute(choice)
        titles = {name: self.title(name, choice) for name in VIEWS}
        return {"frame": self.frame, "views": {name: self.view(name, choice) for name in VIEWS}, "titles": titles}

    def neighbours(self, choice: Choice, layers: Sequence[int]) -> dict[str, list[Choice]]:
        """Every choice one step away, by the part that changes. A step in beta moves all `layers` together."""
        kind, value = choice.skip
        if kind == "share":
            skips = _beside(SHARES, value)
        else:
            steps = _beside(self.betas, value[layers[0]])
            skips = [tuple(step if i in layers else beta for i, beta in enumerate(value)) for step in steps]
        mixes = choice.method == "enumerate"
        near = {
            "r": _beside(self.sizes, choice.r),
            "method": [method for method in self.methods if method != choice.method],
            "mix": _beside(SHARES, choice.mix) if mixes and len(self.grids) == 2 else [],
            "residual": _beside(SHARES, choice.residual) if mixes else [],
            "layer": _beside(range(self.layers), choice.layer),
            "skip": [(kind, skip) for skip in skips],
        }
        return {part: [replace(choice, **{part: other}) for other in others] for part, others in near.items()}

    def title(self, name: str, choice: Choice) -> str:
        """The title of a view, which names the parts of the choice that the view depends on."""
        words = {"layer": f"layer {choice.layer}", "skip": _skipped(choice), "r": f"r = {choice.r}"}
        words["method"] = _searched(choice)
        return ", ".join([VIEWS[name].title, *(words[part] for part in words if part in VIEWS[name].parts)])

    def caption(self, name: str, choice: Choice) -> str:
        """A view in one sentence, for readers who cannot see it."""
        layer, at = choice.layer, f"r = {choice.r} by {_searched(choice)}"
        each = lambda told: "; ".join(f"{corpus}: {told(corpus)}" for corpus in self.grids)  # noqa: E731
        means = each(lambda corpus: "{:.0%} dropped, loss {:.3f}".format(*self._means(corpus, choice)))
        chosen = each(lambda corpus: f"{self.landscape(corpus, choice)['loss']:.3f}")
        most = each(lambda corpus: self._pair(corpus, choice))
        kept = ", ".join(map(str, self.kept(self.first, choice)[0])) or "..."
        subsets = "Losses of all subsets"
        if not self.landscape(self.first, choice)["losses"]:
            subsets = "No landscape is drawn, since every expert stays or subsets are too many,"
        return {
            "kept": f"Grid of the experts kept in every layer, {at}; for {self.first} layer 0 keeps {kept}.",
            "co_selection": f"Heatmap of experts chosen together in layer {layer}; most often, {most}.",
            "landscape": f"{subsets} of layer {layer}, {at}; loss of the chosen one, {chosen}.",
            "skipping": f"Share dropped and loss in every layer, {at}; on average, {means}.",
            "trade_off": f"Mean loss over the share dropped, {at}; now, {means}.",
        }[name]

    def describe(self, choice: Choice) -> dict[str, dict[str, str]]:
        """For each corpus, every number that the views show at a choice, as text by name."""
        layer, words = f"layer {choice.layer}", {}
        for name in self.grids:
            now, kept, (dropped, loss) = self.skipping(name, choice), self.kept(name, choice), self._means(name, choice)
            words[name] = {
                "chosen": f"{choice.r} of {self.n} experts by {_searched(choice)}",
                f"{layer} keeps": ", ".join(map(str, kept[choice.layer])),
                "all layers keep": "; ".join(" ".join(map(str, subset)) for subset in kept),
                f"{layer}, loss by pruning": f"{self.landscape(name, choice)['loss']:.3f} of the output's norm",
                f"{layer}, most often together": self._pair(name, choice),
                "mean loss with skipping": f"{loss:.3f}",
                "layer by layer": ", ".join(f"{each:.2f}" for each in now["loss"]),
                "pairs dropped": f"{100 * dropped:.1f}%",
                "layer by layer, %": ", ".join(f"{100 * share:.0f}" for share in now["dropped"]),
                "betas": ", ".join(f"{beta:.2f}" for beta in now["beta"]),
            }
            if len(self.grids) == 2:
                pairs = zip(*(self.kept(each, choice) for each in self.grids), strict=True)
                same = sum(one == other != [] for one, other in pairs)
                words[name]["layers that keep the same"] = f"{same} of {self.layers}"
        return words

    def _pair(self, name: str, choice: Choice) -> str:
        table = self.co_selection(name, choice)
        i, j = max(itertools.combinations(range(self.n), 2), key=lambda pair: table[pair[0]][pair[1]], default=(0, 0))
        if table[i][j] == 0:
            return "no two, since each token has one expert"
        return f"experts {i} and {j}, for {100 * table[i][j]:.1f}% of tokens"

    def estimate(self, choice: Choice) -> dict[str, str]:
        """Parameters and memory (counted) and decoding speed (nearest measurement) of a real model with this choice. The
        skipped share is the first corpus's."""
        shape, share = self.shape, self._means(self.first, choice)[0]
        experts = max(shape["num_experts_per_tok"], round(shape["num_local_experts"] * choice.r / self.n))
        total, used, read = (mixtral_parameters(shape, experts, skipped) for skipped in (None, share, 0.0))
        return {
            f"{shape['name']} with {experts} experts": f"{2 * total / 2**20:,.0f} MiB in bf16; {total / 1e9:.1f} B parameters, "
            f"{used / 1e9:.1f} B for a token",
            "decoding it at batch 1": f"at most {read / used:.2f} times as fast as without skipping (as on {self.first})",
            "as measured": _measured(experts),
        }

    def plan(self, name: str, choice: Choice) -> PruningPlan:
        """The choice as `prune` and `prune_checkpoint` take it, calibrated on a corpus, with its betas for skipping. Its losses
        are on this corpus, whatever is mixed in: Eq. 3's if enumeration goes by it in part, else the residual loss.

        Raises ValueError if every expert stays, since nothing is pruned.
        """
        if choice.r == self.n:
            raise ValueError(f"r = {self.n} keeps every expert: there is nothing to prune; choose a smaller r.")
        self.compute(choice)
        one, rows = self.grids[name], self._rows(name, choice)
        betas = self.skipping(name, choice)["beta"] if self.k > 1 else None
        loss = "eq3" if choice.method == "enumerate" and choice.residual < 1 else "residual"
        about = {"model": one["model"], "tokens": one["tokens"], "betas": betas, "loss": loss}
        return PruningPlan(_searched(choice), choice.r, self.kept(name, choice), [row[loss] for row in rows], **about)

    def commands(self, path: str | Path) -> list[str]:
        """The commands that use an exported plan."""
        start = "python -m esparse"
        return [f"{start} prune {self.model} pruned --plan {path}", f"{start} evaluate {self.model} --plan {path}"]


def _mean(values: Sequence[float]) -> float:
    """The mean of the values that are not nan; nan if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _key(choice: Choice) -> str:
    """The name of a choice's experts on a grid."""
    return f"{choice.method} {choice.r}" + f" {choice.mix} {choice.residual}" * (choice.method == "enumerate")


def _searched(choice: Choice) -> str:
    """How the experts are chosen, in a few words."""
    shares = {"other corpus": choice.mix, "Eq. 3": 1 - choice.residual} if choice.method == "enumerate" else {}
    mixed = ", ".join(f"{100 * share:.0f}% {name}" for name, share in shares.items() if share)
    return choice.method + f" ({mixed})" * bool(mixed)


def _skipped(choice: Choice) -> str:
    """The skipped pairs, in a few words."""
    kind, value = choice.skip
    if kind == "share":
        return f"{100 * value:.0f}% skipped"
    return f"beta {value[0]:.2f}" if len(set(value)) == 1 else "a beta for each layer"


def _beside(values: Sequence, value) -> list:
    """The values before and after this one."""
    at = values.index(value)
    return [*values[max(0, at - 1) : at], *values[at + 1 : at + 2]]


def mixtral_parameters(shape: Mapping, experts: int, skipped: float | None = None) -> float:
    """Parameters of a Mixtral of this shape with this many experts. skipped: count only the parameters used for a token if
    this share of the pairs 2..k is skipped, without the token's embedding row."""
    h, k = shape["hidden_size"], shape["num_experts_per_tok"]
    head = shape.get("head_dim") or h // shape["num_attention_heads"]
    attention = 2 * h * head * (shape["num_attention_heads"] + shape["num_key_value_heads"])
    run = experts if skipped is None else 1 + (k - 1) * (1 - skipped)
    layer = attention + 2 * h + experts * h + run * 3 * h * shape["intermediate_size"]
    vocabularies = 2 if skipped is None and not shape["tie_word_embeddings"] else 1
    return shape["num_hidden_layers"] * layer + h + vocabularies * shape["vocab_size"] * h


@cache  # reads files, and is called at every step of a slider
def _measured(experts: int) -> str:
    """The decoding gain from skipping at batch 1, for the largest size in `data/results/`."""
    found = results()
    for name, model in (("full", "Mixtral 8x7B"), ("medium", "two layers of its width")):
        if name in found:
            rows = [row for row in decoding_rows(found[name]) if row["batch"] == "1"]
            row = min(rows, key=lambda row: abs(row["r"] - experts))
            return (
                f"{row['gain']:.2f} times as fast with {100 * row['dropped']:.0f}% of the second experts dropped, of at most "
                f"{row['limit of gain']:.2f} (r = {row['r']}, {model}, random weights, {found[name]['device']})"
            )
    return "nothing yet: python -m esparse bench medium"
