"""What the sliders show, as numbers: everything on their grid is computed once from saved traces, then looked up."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .benchmark import FULL
from .files import checkout, digest, read_json, write_json
from .pruning import PruningPlan
from .routers import skip_ratios
from .search import SCORES, all_subsets, ranked, search_layer, subset_losses
from .skips import betas_of_shares
from .speed import decoding_rows, results
from .traces import LayerTrace, Trace, co_selection, output_norm, part

BETAS = [i / 100 for i in range(101)]  # for two experts a token; see `beta_grid`
SHARES = [i / 20 for i in range(21)]
FORMAT = 3  # of what is kept of a grid: another one is computed anew
POINTS = 200  # of a loss landscape, at most
ENUMERABLE = 5000  # subsets of a layer, beyond which no landscape is drawn
ROWS = 65536
VIEWS = ("kept", "co_selection", "landscape", "skipping", "trade_off")
MIXTRAL = FULL | {"name": "Mixtral 8x7B", "num_local_experts": 8, "num_experts_per_tok": 2}


# --- one trace on the grid ------------------------------------------------------------------------------------------


def skip_curve(layer: LayerTrace, kept: Sequence[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Skipping at every beta at once: the ratios of all droppable pairs, rising, float64 [pairs], and the squared
    reconstruction loss (Eq. 3) when the first 0, 1, ... of them are dropped, float64 [pairs + 1].

    A token's pairs are dropped from the last (the ratios of `routers.skip_ratios` fall), so that it has k states, and the
    loss is a running sum over pairs in the order in which a rising beta drops them.
    """
    ratios, changes, whole = [], [], 0.0
    for start in range(0, len(layer.order), ROWS):
        some = part(layer, slice(start, start + ROWS))
        positions, weights = some.routing(kept)
        first = torch.ones(layer.k, layer.k, device=weights.device).tril()  # row j: the first j + 1 pairs stay
        states = weights[:, None] * first.to(weights.dtype)  # [tokens, k, k]
        if layer.router.normalises:
            states = states * (weights.sum(1)[:, None, None] / states.sum(2, keepdim=True))
        losses = some.token_losses(positions[:, None].expand_as(states), states).double()  # [tokens, k]
        whole += losses[:, -1].sum().item()
        ratios.append(skip_ratios(weights).double().flatten())
        changes.append((losses[:, :-1] - losses[:, 1:]).flatten())
    ordered = torch.cat(ratios).sort()
    running = torch.cat(changes)[ordered.indices].cumsum(0) + whole
    return ordered.values, torch.cat([running.new_tensor([whole]), running]).clamp(min=0)


def beta_grid(k: int) -> list[float]:
    """The betas on the grid: up to k - 1, at which every pair that can be dropped is."""
    return BETAS if k == 2 else [i / 20 for i in range(20 * (k - 1) + 1)]


def _skipping(layer: LayerTrace, kept: Sequence[int] | None, norm: float) -> dict:
    """Share dropped and relative loss on the grid of betas, and the betas that drop each share of the other grid."""
    ratios, squares = skip_curve(layer, kept)
    grid = torch.tensor(beta_grid(layer.k), dtype=torch.float64)
    at = torch.searchsorted(ratios, grid)  # a pair goes when its ratio is below beta
    betas = betas_of_shares(ratios, SHARES)
    aimed = torch.searchsorted(ratios, torch.tensor(betas, dtype=torch.float64))
    found = {}
    for name, places in (("", at), ("aimed ", aimed)):
        found[f"{name}dropped"] = (places / len(ratios)).tolist()
        found[f"{name}loss"] = (squares[places].sqrt() / norm).tolist()
    return found | {"aimed betas": betas}


def _landscape(layer: LayerTrace, r: int, norm: float, kept: Mapping[str, Sequence[int]]) -> dict:
    """The relative losses of all subsets of r, best first, thinned to `POINTS`, and of how many subsets each method's stands
    behind; empty where they are too many."""
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


def _methods(layer: LayerTrace) -> list[str]:
    """The methods that need no model: enumeration where it can be had, else greedy removal, which finds nearly the same."""
    try:
        all_subsets(layer, (layer.n + layer.k) // 2)
    except ValueError:
        return ["greedy", *SCORES, "random"]
    return ["enumerate", *SCORES, "random"]


def grid(trace: Trace, sizes: Sequence[int]) -> dict:
    """All that the explorer can show of a trace, as JSON holds it: for each method and r the kept experts, losses and
    skipping in each layer; co-selection; the loss landscapes."""
    first = trace.layers[0]
    methods, layers = _methods(first), range(len(trace.layers))
    norms = [output_norm(layer) for layer in trace.layers]
    places = {str(first.n): [(None, None)] * len(layers)}
    for method, r in tqdm([(method, r) for method in methods for r in sizes], desc="explorer", unit="plan"):
        generator = torch.Generator().manual_seed(0)
        places[f"{method} {r}"] = [search_layer(layer, r, method, generator)[:2] for layer in trace.layers]
    skip = lru_cache(None)(lambda i, kept: _skipping(trace.layers[i], kept, norms[i]) if first.k > 1 else {})  # methods agree
    found = {}
    for key, plan in tqdm(places.items(), desc="skipping", unit="plan"):
        entries = [{"kept": kept or list(range(first.n)), "eq3": loss or 0.0} for kept, loss in plan]
        for i, (entry, (kept, _)) in enumerate(zip(entries, plan, strict=True)):
            entry |= {"relative": entry["eq3"] / norms[i]} | skip(i, kept and tuple(kept))
        found[key] = entries
    return {
        "n": first.n,
        "k": first.k,
        "model": trace.model,
        "tokens": trace.tokens,
        "methods": methods,
        "sizes": [*sizes, first.n],
        "places": found,
        "co_selection": [co_selection(layer).fill_diagonal_(0).tolist() for layer in trace.layers],
        "landscape": {
            str(r): [
                _landscape(layer, r, norms[i], {method: found[f"{method} {r}"][i]["kept"] for method in methods})
                for i, layer in enumerate(trace.layers)
            ]
            for r in sizes
        },
    }


def _sizes(trace: Trace) -> list[int]:
    """Up to eight sizes below n that the trace answers for, rising, evenly spaced up to n."""
    first = trace.layers[0]

    def valid(r: int) -> bool:
        try:
            first.check_size(r)
        except ValueError:  # the router's groups do not allow it
            return False
        return True

    for step in range(max(1, -(-(first.n - trace.keep) // 8)), first.n):
        sizes = [*range(first.n - step, trace.keep - 1, -step)][::-1]
        if sizes and all(map(valid, sizes)):
            return sizes
    return []


def _cached_grid(trace: Trace, folder: Path) -> dict:
    grams = [layer.gram.double().sum().item() for layer in trace.layers]
    path = folder / f"{digest('explorer', FORMAT, trace.model, trace.tokens, trace.keep, grams)}.json"
    if not path.exists():
        write_json(path, grid(trace, _sizes(trace)))
    return read_json(path, "explorer's grid")


# --- what the controls choose ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """A place of the controls. skip: ("betas", one for each layer) on the `beta_grid`, or ("share", one of `SHARES`)."""

    r: int
    method: str
    layer: int = 0
    skip: tuple = ("share", 0.0)


class Explorer:
    """One or two traces of a model, by the name of their corpus, and what they say at every `Choice`.

    traces: `Trace`s or the folders where they were saved. folder: where grids are kept. model: how the command line calls
    the model. shape: the Mixtral that `estimate` speaks of: what its config calls its sizes, and its `name`.
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
        self.grids, self.command = {name: _cached_grid(one, folder) for name, one in read.items()}, model
        self.shape = shape
        first = next(iter(self.grids.values()))
        self.n, self.k, self.sizes, self.methods = (first[key] for key in ("n", "k", "sizes", "methods"))
        self.layers = len(first["co_selection"])

    @cached_property
    def betas(self) -> list[float]:
        """The betas that can be chosen."""
        return beta_grid(self.k)

    @property
    def default(self) -> Choice:
        """Three quarters of the experts, by the best method there is, half of the droppable pairs skipped."""
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
        """In each layer the beta, the share of droppable pairs it drops, and the loss over the norm of the output."""
        kind, values = choice.skip
        found: dict[str, list[float]] = {"beta": [], "dropped": [], "loss": []}
        for i, layer in enumerate(self._place(name, choice)):
            if self.k == 1:
                row = (0.0, 0.0, layer["relative"])
            elif kind == "share":
                at = round(values * (len(SHARES) - 1))
                row = tuple(layer[f"aimed {key}"][at] for key in ("betas", "dropped", "loss"))
            else:
                at = _nearest(self.betas, values[i])
                row = self.betas[at], layer["dropped"][at], layer["loss"][at]
            for column, value in zip(found.values(), row, strict=True):
                column.append(value)
        return found

    def neighbours(self, choice: Choice, layers: Sequence[int]) -> list[Choice]:
        """Every choice that is one step away: of r, the method, the layer, the share, or beta in `layers` together."""
        near = [replace(choice, r=r) for r in _beside(self.sizes, choice.r)]
        near += [replace(choice, method=method) for method in self.methods if method != choice.method]
        near += [replace(choice, layer=layer) for layer in _beside(range(self.layers), choice.layer)]
        mode, at = choice.skip
        if mode == "share":
            return near + [replace(choice, skip=(mode, share)) for share in _beside(SHARES, at)]
        for step in (-1, 1):
            betas = tuple(_further(self.betas, beta, step) if i in layers else beta for i, beta in enumerate(at))
            near += [replace(choice, skip=(mode, betas))] if betas != at else []
        return near

    # --- views ---

    @cached_property
    def frame(self) -> dict:
        """What does not change with the choice: names and the ends of axes, so that two pictures can be compared."""
        grids = self.grids.values()
        landscapes = [loss for one in grids for rows in one["landscape"].values() for row in rows for loss in row["losses"]]
        places = [layer for one in grids for rows in one["places"].values() for layer in rows]
        losses = [max([layer["relative"], *layer.get("loss", []), *layer.get("aimed loss", [])]) for layer in places]
        pairs = max((value for one in grids for table in one["co_selection"] for row in table for value in row), default=0.0)
        shape = {"n": self.n, "k": self.k, "layers": self.layers, "corpora": list(self.grids), "pairs": pairs}
        return shape | {"landscape": max([0.0, *landscapes, *(layer["relative"] for layer in places)]), "loss": max(losses)}

    def view(self, name: str, choice: Choice) -> dict:
        """The numbers of one of `VIEWS`."""
        return getattr(self, f"_{name}")(choice)

    def _kept(self, choice: Choice) -> dict:
        return {"kept": {name: self.kept(name, choice) for name in self.grids}}

    def _co_selection(self, choice: Choice) -> dict:
        tables = {name: one["co_selection"][choice.layer] for name, one in self.grids.items()}
        return {"tables": tables}

    def _landscape(self, choice: Choice) -> dict:
        """Beside the losses how many `others` a subset is compared with, and how many of them are `better`, by its place."""
        found = {}
        for name, one in self.grids.items():
            found[name] = {"losses": [], "others": 0, "better": 0, "loss": self._place(name, choice)[choice.layer]["relative"]}
            if choice.r < self.n:
                row = one["landscape"][str(choice.r)][choice.layer]
                found[name] |= row | {"better": row["better"][choice.method]}
        return {"corpora": found}

    def _skipping(self, choice: Choice) -> dict:
        return {"corpora": {name: self.skipping(name, choice) for name in self.grids}}

    def _trade_off(self, choice: Choice) -> dict:
        found = {}
        for name in self.grids:
            place, now = self._place(name, choice), self.skipping(name, choice)
            keys = ("dropped", "loss") if self.k > 1 else ()
            curve = {key: [_mean(layer[f"aimed {key}"][i] for layer in place) for i in range(len(SHARES))] for key in keys}
            found[name] = curve | {"now": [_mean(now["dropped"]), _mean(now["loss"])]}
        return {"corpora": found}

    def snapshot(self, choice: Choice) -> dict:
        """All `VIEWS` with their titles, as the figure 11_explorer draws them."""
        titles = {name: self.title(name, choice) for name in VIEWS}
        return {"frame": self.frame, "views": {name: self.view(name, choice) for name in VIEWS}, "titles": titles}

    # --- words ---

    def title(self, name: str, choice: Choice) -> str:
        """What stands above a view: with it, what of the choice it depends on."""
        at = f"r = {choice.r}, {choice.method}"
        return {
            "kept": f"experts kept, {at}",
            "co_selection": f"experts chosen together, layer {choice.layer}",
            "landscape": f"loss of all subsets, layer {choice.layer}, {at}",
            "skipping": f"layer by layer, {_skipped(choice)}, {at}",
            "trade_off": f"mean loss, {_skipped(choice)}, {at}",
        }[name]

    def caption(self, name: str, choice: Choice) -> str:
        """A view in a sentence, for who cannot see it."""
        at = f"r = {choice.r} by {choice.method}"
        first = next(iter(self.grids))
        now = {corpus: self.skipping(corpus, choice) for corpus in self.grids}
        means = "; ".join(
            f"{corpus}: {100 * _mean(one['dropped']):.0f}% dropped, loss {_mean(one['loss']):.3f}"
            for corpus, one in now.items()
        )
        pairs = "; ".join(f"{corpus}: {self._pair(corpus, choice.layer)}" for corpus in self.grids)
        chosen = "; ".join(f"{c}: {self._place(c, choice)[choice.layer]['relative']:.3f}" for c in self.grids)
        drawn = any(one["losses"] for one in self._landscape(choice)["corpora"].values())
        subsets = (
            "Losses of all subsets" if drawn else "No landscape is drawn, since every expert stays or subsets are too many,"
        )
        kept = ", ".join(map(str, self.kept(first, choice)[0]))
        return {
            "kept": f"Grid of the experts kept in every layer, {at}; for {first} layer 0 keeps {kept}.",
            "co_selection": f"Heatmap of experts chosen together in layer {choice.layer}; most often, {pairs}.",
            "landscape": f"{subsets} of layer {choice.layer}, {at}; loss of the chosen one, {chosen}.",
            "skipping": f"Share dropped and loss in every layer, {at}; on average, {means}.",
            "trade_off": f"Mean loss over the share dropped, {at}; now, {means}.",
        }[name]

    def told(self, choice: Choice) -> dict[str, dict[str, str]]:
        """Every number that the views show at a choice, in words: of each corpus by what it is."""
        layer, words = f"layer {choice.layer}", {}
        for name in self.grids:
            now, mine = self.skipping(name, choice), self._place(name, choice)[choice.layer]
            same = sum(len({tuple(one[i]) for one in self._all_kept(choice)}) == 1 for i in range(self.layers))
            words[name] = {
                "chosen": f"{choice.r} of {self.n} experts by {choice.method}",
                f"{layer} keeps": ", ".join(map(str, mine["kept"])),
                "all layers keep": "; ".join(" ".join(map(str, kept)) for kept in self.kept(name, choice)),
                f"{layer}, loss by pruning": f"{mine['relative']:.3f} of the output's norm",
                f"{layer}, most often together": self._pair(name, choice.layer),
                "mean loss with skipping": f"{_mean(now['loss']):.3f}",
                "layer by layer": ", ".join(f"{loss:.2f}" for loss in now["loss"]),
                "pairs dropped": f"{100 * _mean(now['dropped']):.1f}%",
                "layer by layer, %": ", ".join(f"{100 * share:.0f}" for share in now["dropped"]),
                "betas": ", ".join(f"{beta:.2f}" for beta in now["beta"]),
            } | ({"layers that keep the same": f"{same} of {self.layers}"} if len(self.grids) == 2 else {})
        return words

    def _all_kept(self, choice: Choice) -> list[list[list[int]]]:
        return [self.kept(name, choice) for name in self.grids]

    def _pair(self, name: str, layer: int) -> str:
        table = self.grids[name]["co_selection"][layer]
        i, j = max(itertools.combinations(range(self.n), 2), key=lambda pair: table[pair[0]][pair[1]], default=(0, 0))
        if table[i][j] == 0:
            return "no two, since each token has one expert"
        return f"experts {i} and {j}, for {100 * table[i][j]:.1f}% of tokens"

    def estimate(self, choice: Choice) -> dict[str, str]:
        """What a choice (of the first corpus) would mean for a real model's shape: counted, and as measured where it was."""
        first, shape = next(iter(self.grids)), self.shape
        share = _mean(self.skipping(first, choice)["dropped"])
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

        Raises ValueError where every expert stays: there is nothing to prune.
        """
        if choice.r == self.n:
            raise ValueError(f"r = {self.n} keeps every expert: there is nothing to prune; choose a smaller r.")
        one, place = self.grids[name], self._place(name, choice)
        betas = self.skipping(name, choice)["beta"] if self.k > 1 else None
        kept, losses = ([layer[key] for layer in place] for key in ("kept", "eq3"))
        return PruningPlan(choice.method, choice.r, kept, losses, one["model"], one["tokens"], betas=betas)

    def commands(self, path: str | Path) -> list[str]:
        """What to type to use an exported plan."""
        start = "python -m esparse"
        return [f"{start} prune {self.command} pruned --plan {path}", f"{start} evaluate {self.command} --plan {path}"]


def _skipped(choice: Choice) -> str:
    """What of the pairs is skipped, in a few words."""
    mode, at = choice.skip
    if mode == "share":
        return f"{100 * at:.0f}% skipped"
    return f"beta {at[0]:.2f}" if len(set(at)) == 1 else "a beta for each layer"


def _nearest(values: Sequence[float], value: float) -> int:
    return min(range(len(values)), key=lambda i: abs(values[i] - value))


def _further(values: Sequence[float], value: float, step: int) -> float:
    """The value of a grid that is so many steps away from this one, or its last."""
    at = _nearest(values, value)
    return values[min(max(at + step, 0), len(values) - 1)]


def _beside(values: Sequence[float], value: float) -> list[float]:
    return [other for step in (-1, 1) if (other := _further(values, value, step)) != value]


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def mixtral_parameters(shape: Mapping, experts: int, skipped: float | None = None) -> float:
    """Parameters of a Mixtral of this shape with so many experts; or those a token is computed with (but for its row of the
    embeddings), where a share of the pairs 2..k is skipped."""
    h, k = shape["hidden_size"], shape["num_experts_per_tok"]
    head = shape.get("head_dim") or h // shape["num_attention_heads"]
    attention = 2 * h * head * (shape["num_attention_heads"] + shape["num_key_value_heads"])
    run = experts if skipped is None else 1 + (k - 1) * (1 - skipped)
    layer = attention + 2 * h + experts * h + run * 3 * h * shape["intermediate_size"]
    vocabularies = 2 if skipped is None and not shape["tie_word_embeddings"] else 1
    return shape["num_hidden_layers"] * layer + h + vocabularies * shape["vocab_size"] * h


@cache  # it reads files, and every step of a slider asks
def _measured(experts: int) -> str:
    """Skipping's gain in decoding at batch 1, from the largest size that `data/results/` holds."""
    found = {name: result for name, result in results().items() if name != "small"}
    if not found:
        return "nothing yet: python -m esparse bench medium"
    name, result = next((name, found[name]) for name in ("full", "medium") if name in found)
    rows = [row for row in decoding_rows(result) if row["batch"] in (1, "1")]
    row = min(rows, key=lambda row: abs(row["r"] - experts))
    what = {"full": "Mixtral 8x7B", "medium": "two layers of its width"}[name]
    return (
        f"{row['gain']:.2f} times as fast with {100 * row['dropped']:.0f}% of the second experts dropped, of at most "
        f"{row['limit of gain']:.2f} (r = {row['r']}, {what}, random weights, {result['device']})"
    )
