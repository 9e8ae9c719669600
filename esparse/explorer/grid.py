"""The numbers that the sliders show: everything on their grid is computed once from traces, then looked up."""

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
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
FORMAT = 8  # a stored grid of another format is computed again
POINTS = 200  # at most, of a loss landscape
ENUMERABLE = 5000  # subsets of a layer; with more, no landscape is drawn
MIXTRAL = MIXTRAL_8X7B | {"name": "Mixtral 8x7B", "num_local_experts": 8, "num_experts_per_tok": 2}


def beta_grid(k: int) -> list[float]:
    """The betas on the grid, up to k - 1: that beta drops every droppable pair."""
    return BETAS if k == 2 else [i / 20 for i in range(20 * (k - 1) + 1)]


def _row(layer: LayerTrace, kept: Sequence[int], norm: float, better: int) -> dict:
    """A subset's losses by pruning alone, the number of `better` subsets, and for each kind of `Choice.skip` its betas, and for
    each beta the share dropped and the relative loss."""
    ratios, squares = skip_curve(layer, kept)
    loss = squares[0].sqrt().item()
    aimed = betas_of_shares(ratios, SHARES) if layer.k > 1 else [0.0] * len(SHARES)
    found = {"kept": kept, "eq3": loss, "relative": loss / norm, "better": better}
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


def _enumerated(traces: Sequence[Trace], r: int) -> list[dict[str, list[tuple[int, ...]]]]:
    """For each trace, the experts that enumeration keeps in each layer, by `_key` of the choice."""
    mixes = SHARES if len(traces) == 2 else [0.0]
    pairs = zip(traces[0].layers, traces[-1].layers, strict=True)
    kept = [*zip(*(_best_of_mixtures(pair, r, mixes) for pair in pairs), strict=True)]
    found = []
    for own in (mixes, mixes[::-1])[: len(traces)]:  # what is one corpus's share is the rest for the other
        choices = [Choice(r, "enumerate", mix=mix, residual=residual) for residual, mix in itertools.product(SHARES, own)]
        found.append(dict(zip(map(_key, choices), kept, strict=True)))
    return found


def _chosen(trace: Trace, r: int, methods: Sequence[str]) -> dict[str, list[tuple[int, ...]]]:
    """The experts that each method but enumeration keeps in each layer by the residual loss, by `_key` of the choice."""
    generator, chosen = torch.Generator().manual_seed(0), {}
    layers = [weighed(layer, "residual") for layer in trace.layers]
    for method in methods:
        if method != "enumerate":
            kept = [tuple(choose_experts(layer, r, method, generator)) for layer in layers]
            chosen[_key(Choice(r, method))] = kept
    return chosen


def _of_size(trace: Trace, r: int, choices: Mapping[str, Sequence[tuple[int, ...]]]) -> dict[str, dict]:
    """The part of a trace's grid for r experts. choices: the experts kept in each layer, by `_key`."""
    places, landscapes, rows = {}, [], []
    subsets = [list(dict.fromkeys(kept)) for kept in zip(*choices.values(), strict=True)]  # of each layer
    for key, kept in choices.items():
        places[key] = [some.index(subset) for some, subset in zip(subsets, kept, strict=True)]
    for layer, some in zip(trace.layers, subsets, strict=True):
        norm = output_norm(layer)
        landscape, better = _landscape(layer, r, norm)
        landscapes.append(landscape)
        residual = losses_of(weighed(layer, "residual"), some).tolist()
        found = [_row(layer, kept, norm, better.get(kept, 0)) for kept in some]
        rows.append([row | {"residual": loss} for row, loss in zip(found, residual, strict=True)])
    return {"places": places, "rows": {str(r): rows}, "landscape": {str(r): landscapes}}


def grids(traces: Sequence[Trace]) -> list[dict]:
    """For each of one or two traces of a model, all data that the explorer shows of it, ready for JSON: for each r and layer
    the losses and skipping of every subset that some choice keeps (`rows`), and for each choice the number of its row in each
    layer (`places`); co-selection; for each r the loss landscapes. The corpora are mixed with each other."""
    first, sizes, found = traces[0].layers[0], _sizes(traces[0]), []
    # Greedy removal finds nearly the same as enumeration. The other methods that need a model are left out.
    exact = affordable(first, (first.n + first.k) // 2)
    methods = ["enumerate" if exact else "greedy", *available_scores(traces[0]), "random"]
    for one in traces:
        pairs = [co_selection(layer).fill_diagonal_(0).tolist() for layer in one.layers]
        about = {"n": first.n, "k": first.k, "model": one.model, "tokens": one.tokens, "methods": methods, "sizes": sizes}
        found.append(about | {"co_selection": pairs, "places": {}, "rows": {}, "landscape": {}})
    for r in tqdm(sizes, desc="explorer", unit="size"):
        enumerated = _enumerated(traces, r) if exact else [{}] * len(traces)
        for one, own, best in zip(traces, found, enumerated, strict=True):
            for key, values in _of_size(one, r, best | _chosen(one, r, methods)).items():
                own[key] |= values
    return found


def _sizes(trace: Trace) -> list[int]:
    """Up to eight sizes below n for which the trace is valid, rising, evenly spaced up to n; then n."""
    first, valid = trace.layers[0], []
    for r in range(trace.keep, first.n):
        with suppress(ValueError):  # the router's groups may forbid this size
            first.check_size(r)
            valid.append(r)
    step = max(1, -(-len(valid) // 8))
    return [*valid[-step::-step][::-1], first.n]


def _cached_grids(traces: Sequence[Trace], folder: Path) -> list[dict]:
    key = [[one.tokens, [layer.gram.double().sum().item() for layer in one.layers]] for one in traces]
    path = folder / f"{digest('explorer', FORMAT, list(EXPERT_SCORES), traces[0].model, traces[0].keep, key)}.json"
    return read_json(made_once(path, lambda path: write_json(path, grids(traces))), "explorer's grid")


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
        folder = Path(folder) if folder else checkout() / ".runs" / "explorer"
        self.grids = dict(zip(read, _cached_grids([*read.values()], folder), strict=True))
        self.model, self.shape = model, shape
        self.first = next(iter(self.grids))
        first = self.grids[self.first]
        self.n, self.k, self.sizes, self.methods = (first[key] for key in ("n", "k", "sizes", "methods"))
        self.layers, self.betas = len(first["co_selection"]), beta_grid(self.k)

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

    def _rows(self, name: str, choice: Choice) -> dict[str, list]:
        """The losses and skipping of the chosen subsets, by layer."""
        one = self.grids[name]
        rows = [rows[at] for rows, at in zip(one["rows"][str(choice.r)], one["places"][_key(choice)], strict=True)]
        return {key: [row[key] for row in rows] for key in rows[0]}

    def kept(self, name: str, choice: Choice) -> list[list[int]]:
        return self._rows(name, choice)["kept"]

    def skipping(self, name: str, choice: Choice) -> dict[str, list[float]]:
        """For each layer: beta, the share of droppable pairs that it drops, and the loss divided by the output's norm."""
        (kind, value), rows, found = choice.skip, self._rows(name, choice), {}
        at = [SHARES.index(value)] * self.layers if kind == "share" else [self.betas.index(beta) for beta in value]
        for key in ("beta", "dropped", "loss"):
            found[key] = [values[i] for values, i in zip(rows[f"{kind} {key}"], at, strict=True)]
        return found

    def _means(self, name: str, choice: Choice) -> list[float]:
        """The share dropped and the loss, means over layers."""
        now = self.skipping(name, choice)
        return [sum(now[key]) / self.layers for key in ("dropped", "loss")]

    def co_selection(self, name: str, choice: Choice) -> list[list[float]]:
        return self.grids[name]["co_selection"][choice.layer]

    def landscape(self, name: str, choice: Choice) -> dict:
        """The losses of all subsets and of the chosen one; the number of `others`, and of those that are `better`."""
        rows, layer = self._rows(name, choice), choice.layer
        landscape = self.grids[name]["landscape"][str(choice.r)][layer]
        return landscape | {"better": rows["better"][layer], "loss": rows["relative"][layer]}

    def trade_off(self, name: str, choice: Choice) -> dict[str, list[float]]:
        """The share dropped and the loss, means over layers, for each of `SHARES`; and now."""
        rows, found = self._rows(name, choice), {}
        for key in ("dropped", "loss"):
            found[key] = [sum(values) / self.layers for values in zip(*rows[f"share {key}"], strict=True)]
        return found | {"now": self._means(name, choice)}

    @cached_property
    def frame(self) -> dict:
        """The names and ranges of the axes. They do not change with the choice, so that two pictures can be compared."""
        grids = self.grids.values()
        pairs = [value for one in grids for table in one["co_selection"] for row in table for value in row]
        landscapes = [loss for one in grids for rows in one["landscape"].values() for row in rows for loss in row["losses"]]
        rows = [row for one in grids for layers in one["rows"].values() for rows in layers for row in rows]
        pruned = [row["relative"] for row in rows]
        skipped = [loss for row in rows for kind in ("share", "betas") for loss in row[f"{kind} loss"]]
        shape = {"n": self.n, "k": self.k, "layers": self.layers, "corpora": list(self.grids), "pairs": max(pairs, default=0.0)}
        return shape | {"landscape": max([0.0, *landscapes, *pruned]), "loss": max([*pruned, *skipped])}

    def view(self, name: str, choice: Choice) -> dict:
        """The numbers of one of `VIEWS`: for each corpus, what the method of that name returns."""
        key = {"kept": "kept", "co_selection": "tables"}.get(name, "corpora")  # as in figures/11_explorer.json
        return {key: {corpus: getattr(self, name)(corpus, choice) for corpus in self.grids}}

    def snapshot(self, choice: Choice) -> dict:
        """The data and titles of all `VIEWS`, as the figure 11_explorer draws them."""
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
        most = each(lambda corpus: self._pair(corpus, layer))
        kept = ", ".join(map(str, self.kept(self.first, choice)[0]))
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
                f"{layer}, most often together": self._pair(name, choice.layer),
                "mean loss with skipping": f"{loss:.3f}",
                "layer by layer": ", ".join(f"{each:.2f}" for each in now["loss"]),
                "pairs dropped": f"{100 * dropped:.1f}%",
                "layer by layer, %": ", ".join(f"{100 * share:.0f}" for share in now["dropped"]),
                "betas": ", ".join(f"{beta:.2f}" for beta in now["beta"]),
            }
            if len(self.grids) == 2:
                same = sum(one == other for one, other in zip(*(self.kept(each, choice) for each in self.grids), strict=True))
                words[name]["layers that keep the same"] = f"{same} of {self.layers}"
        return words

    def _pair(self, name: str, layer: int) -> str:
        table = self.grids[name]["co_selection"][layer]
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
        one, rows = self.grids[name], self._rows(name, choice)
        betas = self.skipping(name, choice)["beta"] if self.k > 1 else None
        loss = "eq3" if choice.method == "enumerate" and choice.residual < 1 else "residual"
        about = {"model": one["model"], "tokens": one["tokens"], "betas": betas, "loss": loss}
        return PruningPlan(_searched(choice), choice.r, rows["kept"], rows[loss], **about)

    def commands(self, path: str | Path) -> list[str]:
        """The commands that use an exported plan."""
        start = "python -m esparse"
        return [f"{start} prune {self.model} pruned --plan {path}", f"{start} evaluate {self.model} --plan {path}"]


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
