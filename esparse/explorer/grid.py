"""The numbers that the sliders show: everything on their grid is computed once from traces, then looked up."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..files import checkout, digest, read_json, write_json
from ..measure.decoding import decoding_rows, results
from ..measure.search_cost import affordable
from ..measure.timing import MIXTRAL_8X7B
from ..pruning.plan import PruningPlan
from ..pruning.scores import EXPERT_SCORES, ranked
from ..pruning.search import search_layer, subset_losses
from ..tracing.losses import output_norm, skip_curve
from ..tracing.statistics import betas_of_shares, co_selection
from ..tracing.trace import LayerTrace, Trace
from .views import VIEWS

BETAS = [i / 100 for i in range(101)]  # for two experts a token; see `beta_grid`
SHARES = [i / 20 for i in range(21)]
FORMAT = 3  # a stored grid of another format is computed again
POINTS = 200  # at most, of a loss landscape
ENUMERABLE = 5000  # subsets of a layer; with more, no landscape is drawn
MIXTRAL = MIXTRAL_8X7B | {"name": "Mixtral 8x7B", "num_local_experts": 8, "num_experts_per_tok": 2}


# --- one trace on the grid ------------------------------------------------------------------------------------------


def beta_grid(k: int) -> list[float]:
    """The betas on the grid, up to k - 1: that beta drops every droppable pair."""
    return BETAS if k == 2 else [i / 20 for i in range(20 * (k - 1) + 1)]


def _skipping(layer: LayerTrace, kept: Sequence[int] | None, norm: float) -> dict:
    """Share dropped and relative loss at each beta of the grid; and the betas that drop `SHARES`, with the same two."""
    ratios, squares = skip_curve(layer, kept)
    betas = betas_of_shares(ratios, SHARES)
    found = {}
    for name, values in (("", beta_grid(layer.k)), ("aimed ", betas)):
        places = torch.searchsorted(ratios, torch.tensor(values, dtype=torch.float64))  # drops pairs with a ratio below beta
        found[f"{name}dropped"] = (places / len(ratios)).tolist()
        found[f"{name}loss"] = (squares[places].sqrt() / norm).tolist()
    return found | {"aimed betas": betas}


def _landscape(layer: LayerTrace, r: int, norm: float, kept: Mapping[str, Sequence[int]]) -> dict:
    """The relative losses of all subsets of r, best first, thinned to `POINTS`; and for each method the number of subsets
    better than its own. Empty if there are too many subsets."""
    if math.comb(layer.n, r) > ENUMERABLE:
        return {"losses": [], "others": 0, "better": dict.fromkeys(kept, 0)}
    subsets, losses = subset_losses(layer, r)
    order = ranked(losses)
    places, last = order.argsort().tolist(), len(order) - 1
    shown = (losses[order] / norm).tolist()
    return {
        "losses": [shown[round(i)] for i in torch.linspace(0, last, min(POINTS, last + 1)).tolist()],
        "others": last,
        "better": {method: places[subsets.index(tuple(subset))] for method, subset in kept.items()},
    }


def grid(trace: Trace, sizes: Sequence[int]) -> dict:
    """All data that the explorer shows of a trace, ready for JSON: kept experts, losses and skipping in each layer for each
    method and r; co-selection; loss landscapes."""
    first, layers = trace.layers[0], list(enumerate(trace.layers))
    # Greedy removal finds nearly the same as enumeration. The other methods that need a model are left out.
    methods = ["enumerate" if affordable(first, (first.n + first.k) // 2) else "greedy", *EXPERT_SCORES, "random"]
    norms = [output_norm(layer) for layer in trace.layers]
    skip = lru_cache(None)(lambda i, kept: _skipping(trace.layers[i], kept, norms[i]) if first.k > 1 else {})  # methods agree
    everyone = {"kept": list(range(first.n)), "eq3": 0.0, "relative": 0.0}
    places = {str(first.n): [everyone | skip(i, None) for i, _ in layers]}
    for method, r in tqdm([(method, r) for method in methods for r in sizes], desc="explorer", unit="plan"):
        generator, entries = torch.Generator().manual_seed(0), []
        for i, layer in layers:
            kept, loss, _ = search_layer(layer, r, method, generator)
            entries.append({"kept": kept, "eq3": loss, "relative": loss / norms[i]} | skip(i, tuple(kept)))
        places[f"{method} {r}"] = entries
    landscapes = {}
    for r in sizes:
        kept = [{method: places[f"{method} {r}"][i]["kept"] for method in methods} for i, _ in layers]
        landscapes[str(r)] = [_landscape(layer, r, norms[i], kept[i]) for i, layer in layers]
    return {
        "n": first.n,
        "k": first.k,
        "model": trace.model,
        "tokens": trace.tokens,
        "methods": methods,
        "sizes": [*sizes, first.n],
        "places": places,
        "co_selection": [co_selection(layer).fill_diagonal_(0).tolist() for _, layer in layers],
        "landscape": landscapes,
    }


def _sizes(trace: Trace) -> list[int]:
    """Up to eight sizes below n for which the trace is valid, rising, evenly spaced up to n."""
    first = trace.layers[0]
    for step in range(max(1, -(-(first.n - trace.keep) // 8)), first.n):
        sizes = [*range(first.n - step, trace.keep - 1, -step)][::-1]
        with suppress(ValueError):  # the router's groups may forbid one of these sizes
            for r in sizes:
                first.check_size(r)
            if sizes:
                return sizes
    return []


def _cached_grid(trace: Trace, folder: Path) -> dict:
    grams = [layer.gram.double().sum().item() for layer in trace.layers]
    path = folder / f"{digest('explorer', FORMAT, list(EXPERT_SCORES), trace.model, trace.tokens, trace.keep, grams)}.json"
    if not path.exists():
        write_json(path, grid(trace, _sizes(trace)))
    return read_json(path, "explorer's grid")


# --- what the controls choose ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """The values of the controls. skip: ("betas", a beta of `beta_grid` for each layer) or ("share", one of `SHARES`)."""

    r: int
    method: str
    layer: int = 0
    skip: tuple = ("share", 0.0)


class Explorer:
    """The numbers and words of one or two traces of a model at every `Choice`.

    traces: `Trace`s or their folders, by the name of their corpus. folder: where grids are stored.
    model: its name on the command line. shape: the Mixtral for `estimate`: its sizes, named as in its config, and its `name`.
    Raises ValueError, or FileNotFoundError, for traces that cannot be read or do not belong together.
    """

    def __init__(
        self,
        traces: Mapping[str, Trace | str | Path],
        folder: str | Path | None = None,
        model: str = "MODEL",
        shape: Mapping = MIXTRAL,
    ):
        if not 1 <= len(traces) <= 2:
            raise ValueError(f"The explorer shows one trace, or two side by side, got {len(traces)}.")
        read = {name: one if isinstance(one, Trace) else Trace.load(one) for name, one in traces.items()}
        if not all(one.layers for one in read.values()):
            raise ValueError("This trace holds no MoE layer: trace again.")
        if len({(one.model, len(one.layers), one.keep) for one in read.values()}) > 1:
            raise ValueError("These traces are of different models or sizes, and cannot stand side by side.")
        folder = Path(folder) if folder else checkout() / ".runs" / "explorer"
        self.grids = {name: _cached_grid(one, folder) for name, one in read.items()}
        self.model, self.shape = model, shape
        first = next(iter(self.grids.values()))
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

    def _place(self, name: str, choice: Choice) -> list[dict]:
        return self.grids[name]["places"][str(self.n) if choice.r == self.n else f"{choice.method} {choice.r}"]

    def kept(self, name: str, choice: Choice) -> list[list[int]]:
        return [layer["kept"] for layer in self._place(name, choice)]

    def skipping(self, name: str, choice: Choice) -> dict[str, list[float]]:
        """For each layer: beta, the share of droppable pairs that it drops, and the loss divided by the output's norm."""
        kind, value = choice.skip
        rows = []
        for i, layer in enumerate(self._place(name, choice)):
            if self.k == 1:
                rows.append((0.0, 0.0, layer["relative"]))
            elif kind == "share":
                at = round(value * (len(SHARES) - 1))
                rows.append(tuple(layer[f"aimed {key}"][at] for key in ("betas", "dropped", "loss")))
            else:
                at = _nearest(self.betas, value[i])
                rows.append((self.betas[at], layer["dropped"][at], layer["loss"][at]))
        return dict(zip(("beta", "dropped", "loss"), map(list, zip(*rows, strict=True)), strict=True))

    def neighbours(self, choice: Choice, layers: Sequence[int]) -> list[Choice]:
        """Every choice one step away: in r, method, layer, share, or the beta of all `layers` together."""
        near = [replace(choice, r=r) for r in _beside(self.sizes, choice.r)]
        near += [replace(choice, method=method) for method in self.methods if method != choice.method]
        near += [replace(choice, layer=layer) for layer in _beside(range(self.layers), choice.layer)]
        kind, value = choice.skip
        if kind == "share":
            return near + [replace(choice, skip=(kind, share)) for share in _beside(SHARES, value)]
        for step in (-1, 1):
            betas = tuple(_further(self.betas, beta, step) if i in layers else beta for i, beta in enumerate(value))
            near += [replace(choice, skip=(kind, betas))] if betas != value else []
        return near

    # --- views ---

    @cached_property
    def frame(self) -> dict:
        """The names and ranges of the axes. They do not change with the choice, so that two pictures can be compared."""
        grids = self.grids.values()
        pairs = [value for one in grids for table in one["co_selection"] for row in table for value in row]
        landscapes = [loss for one in grids for rows in one["landscape"].values() for row in rows for loss in row["losses"]]
        places = [layer for one in grids for rows in one["places"].values() for layer in rows]
        pruned = [layer["relative"] for layer in places]
        skipped = [loss for layer in places for key in ("loss", "aimed loss") for loss in layer.get(key, ())]
        shape = {"n": self.n, "k": self.k, "layers": self.layers, "corpora": list(self.grids), "pairs": max(pairs, default=0.0)}
        return shape | {"landscape": max([0.0, *landscapes, *pruned]), "loss": max([*pruned, *skipped])}

    def view(self, name: str, choice: Choice) -> dict:
        """The numbers of one of `VIEWS`."""
        return getattr(self, f"_{name}")(choice)

    def _kept(self, choice: Choice) -> dict:
        return {"kept": {name: self.kept(name, choice) for name in self.grids}}

    def _co_selection(self, choice: Choice) -> dict:
        return {"tables": {name: one["co_selection"][choice.layer] for name, one in self.grids.items()}}

    def _landscape(self, choice: Choice) -> dict:
        """The losses of all subsets and of the chosen one; the number of `others`, and of those that are `better`."""
        found = {}
        for name, one in self.grids.items():
            found[name] = {"losses": [], "others": 0, "better": 0, "loss": self._place(name, choice)[choice.layer]["relative"]}
            if choice.r < self.n:
                found[name] |= (row := one["landscape"][str(choice.r)][choice.layer])
                found[name]["better"] = row["better"][choice.method]
        return {"corpora": found}

    def _skipping(self, choice: Choice) -> dict:
        return {"corpora": {name: self.skipping(name, choice) for name in self.grids}}

    def _trade_off(self, choice: Choice) -> dict:
        found = {}
        for name in self.grids:
            place, keys = self._place(name, choice), ("dropped", "loss") if self.k > 1 else ()
            curve = {key: [_mean(layer[f"aimed {key}"][i] for layer in place) for i in range(len(SHARES))] for key in keys}
            found[name] = curve | {"now": self._means(name, choice)}
        return {"corpora": found}

    def _means(self, name: str, choice: Choice) -> list[float]:
        """The share dropped and the loss, means over layers."""
        now = self.skipping(name, choice)
        return [_mean(now["dropped"]), _mean(now["loss"])]

    def snapshot(self, choice: Choice) -> dict:
        """The data and titles of all `VIEWS`, as the figure 11_explorer draws them."""
        titles = {name: self.title(name, choice) for name in VIEWS}
        return {"frame": self.frame, "views": {name: self.view(name, choice) for name in VIEWS}, "titles": titles}

    # --- words ---

    def title(self, name: str, choice: Choice) -> str:
        """The title of a view, which names the parts of the choice that the view depends on."""
        at = f"r = {choice.r}, {choice.method}"
        return {
            "kept": f"experts kept, {at}",
            "co_selection": f"experts chosen together, layer {choice.layer}",
            "landscape": f"loss of all subsets, layer {choice.layer}, {at}",
            "skipping": f"layer by layer, {_skipped(choice)}, {at}",
            "trade_off": f"mean loss, {_skipped(choice)}, {at}",
        }[name]

    def caption(self, name: str, choice: Choice) -> str:
        """A view in one sentence, for readers who cannot see it."""
        layer, at = choice.layer, f"r = {choice.r} by {choice.method}"
        each = lambda told: "; ".join(f"{corpus}: {told(corpus)}" for corpus in self.grids)  # noqa: E731
        means = each(lambda corpus: "{:.0%} dropped, loss {:.3f}".format(*self._means(corpus, choice)))
        chosen = each(lambda corpus: f"{self._place(corpus, choice)[layer]['relative']:.3f}")
        subsets = "Losses of all subsets"
        if not any(one["losses"] for one in self._landscape(choice)["corpora"].values()):
            subsets = "No landscape is drawn, since every expert stays or subsets are too many,"
        first = next(iter(self.grids))
        kept = ", ".join(map(str, self.kept(first, choice)[0]))
        most = each(lambda corpus: self._pair(corpus, layer))
        return {
            "kept": f"Grid of the experts kept in every layer, {at}; for {first} layer 0 keeps {kept}.",
            "co_selection": f"Heatmap of experts chosen together in layer {layer}; most often, {most}.",
            "landscape": f"{subsets} of layer {layer}, {at}; loss of the chosen one, {chosen}.",
            "skipping": f"Share dropped and loss in every layer, {at}; on average, {means}.",
            "trade_off": f"Mean loss over the share dropped, {at}; now, {means}.",
        }[name]

    def describe(self, choice: Choice) -> dict[str, dict[str, str]]:
        """For each corpus, every number that the views show at a choice, as text by name."""
        layer, words = f"layer {choice.layer}", {}
        for name in self.grids:
            now, mine, kept = self.skipping(name, choice), self._place(name, choice)[choice.layer], self.kept(name, choice)
            words[name] = {
                "chosen": f"{choice.r} of {self.n} experts by {choice.method}",
                f"{layer} keeps": ", ".join(map(str, mine["kept"])),
                "all layers keep": "; ".join(" ".join(map(str, subset)) for subset in kept),
                f"{layer}, loss by pruning": f"{mine['relative']:.3f} of the output's norm",
                f"{layer}, most often together": self._pair(name, choice.layer),
                "mean loss with skipping": f"{_mean(now['loss']):.3f}",
                "layer by layer": ", ".join(f"{loss:.2f}" for loss in now["loss"]),
                "pairs dropped": f"{100 * _mean(now['dropped']):.1f}%",
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
        first, shape = next(iter(self.grids)), self.shape
        share = self._means(first, choice)[0]
        experts = max(shape["num_experts_per_tok"], round(shape["num_local_experts"] * choice.r / self.n))
        total, used, read = (mixtral_parameters(shape, experts, skipped) for skipped in (None, share, 0.0))
        return {
            f"{shape['name']} with {experts} experts": f"{2 * total / 2**20:,.0f} MiB in bf16; {total / 1e9:.1f} B parameters, "
            f"{used / 1e9:.1f} B for a token",
            "decoding it at batch 1": f"at most {read / used:.2f} times as fast as without skipping (as on {first})",
            "as measured": _measured(experts),
        }

    def plan(self, name: str, choice: Choice) -> PruningPlan:
        """The choice as `prune` and `prune_checkpoint` take it, calibrated on a corpus, with its betas for skipping.

        Raises ValueError if every expert stays, since nothing is pruned.
        """
        if choice.r == self.n:
            raise ValueError(f"r = {self.n} keeps every expert: there is nothing to prune; choose a smaller r.")
        one, place = self.grids[name], self._place(name, choice)
        betas = self.skipping(name, choice)["beta"] if self.k > 1 else None
        kept, losses = ([layer[key] for layer in place] for key in ("kept", "eq3"))
        return PruningPlan(choice.method, choice.r, kept, losses, one["model"], one["tokens"], betas=betas)

    def commands(self, path: str | Path) -> list[str]:
        """The commands that use an exported plan."""
        start = "python -m esparse"
        return [f"{start} prune {self.model} pruned --plan {path}", f"{start} evaluate {self.model} --plan {path}"]


def _skipped(choice: Choice) -> str:
    """The skipped pairs, in a few words."""
    kind, value = choice.skip
    if kind == "share":
        return f"{100 * value:.0f}% skipped"
    return f"beta {value[0]:.2f}" if len(set(value)) == 1 else "a beta for each layer"


def _nearest(values: Sequence[float], value: float) -> int:
    return min(range(len(values)), key=lambda i: abs(values[i] - value))


def _further(values: Sequence[float], value: float, step: int) -> float:
    """The grid value `step` steps away from this one, or the grid's end."""
    return values[min(max(_nearest(values, value) + step, 0), len(values) - 1)]


def _beside(values: Sequence[float], value: float) -> list[float]:
    return [other for step in (-1, 1) if (other := _further(values, value, step)) != value]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


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
