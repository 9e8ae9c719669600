"""Figures: each function of `FIGURES` draws one from its numbers alone, and computes nothing."""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import matplotlib.image
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .files import checkout, read_json, write_json
from .gallery import ABOUT, manifest
from .stages import VIEWS
from .style import COLOURS, MARKERS, STYLE, NotebookFigure, canvas, log_axis, of_the_paper

DIGITS = 4  # of the numbers behind figures
SKIPPING = {"none": "no skipping", "median": "median beta", "top-1": "top-1 (control)"}


def draw(name: str, data: dict) -> Figure:
    """Draw a figure of `FIGURES` from its numbers. Raises ValueError for an unknown name."""
    if name not in FIGURES:
        raise ValueError(f"There is no figure {name!r}: choose from {', '.join(FIGURES)}.")
    with matplotlib.rc_context(STYLE):
        figure = FIGURES[name](data)
    figure.alt = ABOUT[name][1]
    return figure


def rounded(data):
    """The numbers behind a figure, in lists and dictionaries, to `DIGITS` significant digits, or to whole ones where that is
    more.

    So many are the same on every CPU. With the tiny model on torch's kernels without vectors, on those for AVX2, on MKL's for
    any processor, on one and two threads: losses differ by 5e-8, betas by 8e-7, densities by 3e-6 of themselves. Where
    rounding sends a token elsewhere, that number differs by more; see `alike`.
    """
    if isinstance(data, dict):
        return {key: rounded(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [rounded(value) for value in data]
    if not isinstance(data, float) or not data or not math.isfinite(data):
        return data
    return round(data, max(0, DIGITS - 1 - math.floor(math.log10(abs(data)))))


def alike(one, other) -> bool:
    """Whether two figures' numbers say the same: none differs by more than a few tokens of 16,384 make.

    One that another CPU sends to another expert was seen to change a perplexity by 0.06%, one on the other side of beta a
    loss by 0.08%, one in the next bin a density by 0.4%.
    """
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=5e-3, abs_tol=1e-3)
    return type(one) is type(other) and one == other


def save_figure(name: str, data: dict, folder: str | Path) -> Figure:
    """Draw a figure and save NAME.png, NAME.pdf and the numbers behind it, `rounded`, as NAME.json; the same picture every
    time, and but for the layout's last bits the same bytes."""
    folder, data = Path(folder), rounded(data)
    figure = draw(name, data)
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for kind, metadata in {"png": {"Software": None}, "pdf": {"CreationDate": None}}.items():
            temporary = folder / f".{name}.{kind}"
            figure.savefig(temporary, format=kind, dpi=150, metadata=metadata)
            temporary.replace(folder / f"{name}.{kind}")
    write_json(folder / f"{name}.json", data)
    return figure


def publish(name: str, source: Path, folder: Path) -> bool:
    """Take a figure and its numbers over from another folder; whether that was needed, since they say or show something
    else than what is there."""
    places = [place / f"{name}.json" for place in (source, folder)]
    if places[1].exists() and alike(*(read_json(path, "figure's numbers") for path in places)) and _look_alike(*places):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "pdf", "json"):
        shutil.copyfile(source / f"{name}.{kind}", folder / f"{name}.{kind}")
    return True


def _look_alike(*places: Path) -> bool:
    """Whether the images beside two files of numbers differ in less than a thousandth of their pixels: numbers that say the
    same may round a curve otherwise."""
    one, other = (matplotlib.image.imread(path.with_suffix(".png")) for path in places)
    return one.shape == other.shape and (abs(one - other) > 0.03).mean() < 1e-3


def redraw(names: Sequence[str] = (), folder: Path | None = None) -> list[Path]:
    """Draw figures again from their saved numbers; returns the PNGs. Raises FileNotFoundError where there are none."""
    folder = Path(folder) if folder else checkout() / "figures"
    names = names or sorted(path.stem for path in folder.glob("[0-9][0-9]_*.json"))
    if not names:
        raise FileNotFoundError(f"There are no figures in {folder}: run the notebooks first.")
    for name in names:
        save_figure(name, read_json(folder / f"{name}.json", "figure's numbers"), folder)
    if folder == checkout() / "figures":
        write_json(folder / "manifest.json", manifest())
    return [folder / f"{name}.png" for name in names]


# --- 00 to 02 -------------------------------------------------------------------------------------------------------


def _quickstart(data: dict) -> Figure:
    figure, [[axes]] = canvas(5, 2.6)
    models, corpora = list(data["perplexity"]), data["corpora"]
    for i, corpus in enumerate(corpora):
        at = [m + (i - 0.5) * 0.35 for m in range(len(models))]
        bars = axes.bar(at, [data["perplexity"][m][i] for m in models], 0.33, color=COLOURS[i], label=corpus)
        axes.bar_label(bars, fmt="%.2f", padding=1, fontsize=8)
    axes.set(xticks=range(len(models)), xticklabels=models, ylabel="perplexity, held-out (lower is better)", ylim=(1, None))
    axes.legend()
    return figure


def _moe_layer(data: dict) -> Figure:
    """What an MoE layer does with one token (the paper's Fig. 2): the router's weights, the best k experts, their sum."""
    figure, [[axes]] = canvas(7, 2.6)
    n, chosen = len(data["weights"]), dict(zip(data["chosen"], data["normalised"], strict=True))
    for expert, weight in enumerate(data["weights"]):
        colour = COLOURS[0] if expert in chosen else "0.8"
        axes.add_patch(Rectangle((expert + 0.1, 1.6), 0.8, 1.2 * weight / max(data["weights"]), color=colour))
        axes.add_patch(Rectangle((expert + 0.1, 0.6), 0.8, 0.6, facecolor=colour, edgecolor="0.3"))
        axes.text(expert + 0.5, 0.9, f"f{expert}", ha="center", va="center", color="white" if expert in chosen else "0.3")
        axes.text(expert + 0.5, 1.45, f"{weight:.2f}", ha="center", va="center", fontsize=8)
    for expert in chosen:
        axes.annotate("", (n / 2, -0.35), (expert + 0.5, 0.58), arrowprops={"arrowstyle": "->", "color": COLOURS[0]})
    total = " + ".join(f"{weight:.2f} f{expert}(x)" for expert, weight in chosen.items())
    axes.text(n / 2, -0.55, f"output = {total}", ha="center", va="center")
    for height, words in ((2.2, "routing weights"), (0.9, "experts")):
        axes.text(-0.1, height, words, ha="right", va="center")
    axes.set(xlim=(-1.6, n), ylim=(-0.75, 2.9))
    axes.set_axis_off()
    figure.supxlabel(f"a token of layer {data['layer']}: the best {len(chosen)} of {n}, renormalised", fontsize=9)
    return figure


def _method(data: dict) -> Figure:
    """Pruning removes experts for all tokens, skipping a token's second expert where it weighs little (the paper's Fig. 3)."""
    figure, [[left, right]] = canvas(8, 2.9, 1, 2)
    n, candidates = data["n"], data["candidates"]
    for row, candidate in enumerate(candidates):
        for expert in range(n):
            kept = expert in candidate["kept"]
            style = {"facecolor": COLOURS[0] if row == 0 else "0.6"} if kept else {"facecolor": "white", "hatch": "////"}
            left.add_patch(Rectangle((expert + 0.08, -row + 0.1), 0.84, 0.7, edgecolor="0.4", lw=0.6, **style))
        left.text(n + 0.2, -row + 0.45, f"loss {candidate['loss']:.2f}", va="center")
    left.set(
        xlim=(0, n + 2.4), ylim=(-len(candidates) + 0.9, 1), title=f"pruning: of the subsets of {data['r']}, the best stays"
    )
    for row, (first, second) in enumerate(data["tokens"]):
        dropped = second < data["beta"] * first
        right.add_patch(Rectangle((0, -row + 0.1), first, 0.7, facecolor=COLOURS[0], edgecolor="0.4"))
        style = {"facecolor": "white", "hatch": "////"} if dropped else {"facecolor": COLOURS[1]}
        right.add_patch(Rectangle((first, -row + 0.1), second, 0.7, edgecolor="0.4", lw=0.6, **style))
        right.text(1.03, -row + 0.45, f"{second / first:.2f}" + (", skipped" if dropped else ""), va="center")
    right.set(xlim=(0, 1.5), ylim=(-len(data["tokens"]) + 0.9, 1))
    behind = "a second expert" if data["k"] == 2 else "experts behind the first, together"
    right.set_title(f"skipping: {behind} below {data['beta']:.2f} of the first")
    for axes in (left, right):
        axes.set_axis_off()
    figure.supxlabel(
        f"layer {data['layer']}; hatched: not computed; on the right, the ratio of the routing weights", fontsize=9
    )
    return figure


def _frequency(data: dict) -> Figure:
    corpora = data["corpora"]
    figure, [row] = canvas(8, 3, 1, 3, sharey=True)
    tables = [c["frequency"] for c in corpora.values()]
    top = max(max(map(max, table)) for table in tables)
    for axes, name, table in zip(row, corpora, tables, strict=False):
        sns.heatmap(table, ax=axes, vmin=0, vmax=top, cmap="viridis", cbar_kws={"label": "share of tokens"})
        axes.set(title=name, xlabel="expert")
    change = [[b - a for a, b in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)]
    sns.heatmap(change, ax=row[2], center=0, cmap="vlag", cbar_kws={"label": "difference"})
    row[2].set(title="second minus first", xlabel="expert")
    row[0].set_ylabel("layer")
    return figure


def _co_selection(data: dict) -> Figure:
    corpora = data["corpora"]
    layers = list(next(iter(corpora.values()))["co_selection"])
    figure, grid = canvas(2.6 * len(layers) + 0.8, 5, len(corpora), len(layers), sharex=True, sharey=True)
    pairs = {c: {k: _off_diagonal(t) for k, t in v["co_selection"].items()} for c, v in corpora.items()}
    top = max(max(map(max, table)) for c in pairs.values() for table in c.values())
    for row, (name, tables) in zip(grid, pairs.items(), strict=True):
        for axes, layer in zip(row, layers, strict=True):
            sns.heatmap(tables[layer], ax=axes, vmin=0, vmax=top, cmap="viridis", square=True, cbar=axes is row[-1])
            axes.set_title(f"{name}\nlayer {layer}" if axes is row[0] else f"layer {layer}")
    figure.supxlabel("expert")
    figure.supylabel("expert; colour: share of tokens that choose both")
    return figure


def _off_diagonal(table: list[list[float]]) -> list[list[float]]:
    return [[0.0 if i == j else value for j, value in enumerate(row)] for i, row in enumerate(table)]


def _kept(data: dict) -> Figure:
    (first, second), n = data["kept"].items(), data["n"]
    layers = len(first[1])
    figure, [[axes]] = canvas(7, 0.34 * n + 1.2)
    kinds = {
        "kept for both": ([], "s", "0.45"),
        f"only for {first[0]}": ([], "o", COLOURS[0]),
        f"only for {second[0]}": ([], "D", COLOURS[1]),
    }
    for layer in range(layers):
        one, two = set(first[1][layer]), set(second[1][layer])
        for chosen, (points, _, _) in zip((one & two, one - two, two - one), kinds.values(), strict=True):
            points += [(layer, expert) for expert in sorted(chosen)]
    for name, (points, marker, colour) in kinds.items():
        axes.scatter(*zip(*points, strict=True) if points else ([], []), marker=marker, color=colour, s=70, label=name)
    for layer in data["identical"]:
        axes.axvspan(layer - 0.45, layer + 0.45, color="0.9", zorder=0)
    axes.set(
        xlabel="layer (grey: the same subset)", ylabel="expert", xticks=range(layers), yticks=range(n), ylim=(-0.6, n - 0.4)
    )
    axes.set_title(
        f"r = {data['r']}: same subset in {len(data['identical'])} of {layers} layers, {data['chance']:.2f} by chance"
    )
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _divergence(data: dict) -> Figure:
    figure, [[axes]] = canvas(5, 3)
    layers = range(len(data["between"]))
    axes.plot(layers, data["between"], marker="o", color=COLOURS[0], label=" against ".join(data["labels"]))
    axes.plot(layers, data["within"], marker="s", ls="--", color="0.5", label=f"two draws of {data['labels'][0]}")
    axes.set(xlabel="layer", ylabel="total variation of the routing", xticks=layers, ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=1)
    return figure


# --- 03 -------------------------------------------------------------------------------------------------------------


def _landscape(data: dict) -> Figure:
    layers = data["layers"]
    figure, [row] = canvas(1.5 * len(layers) + 1, 2.8, 1, len(layers), sharey=True)
    for number, (axes, layer) in enumerate(zip(row, layers, strict=True)):
        order = sorted(range(len(layer["losses"])), key=layer["losses"].__getitem__)
        axes.plot([layer["losses"][i] for i in order], color="0.6", lw=1.5)
        for i, (method, at) in enumerate(layer["chosen"].items()):
            axes.plot(order.index(at), layer["losses"][at], MARKERS[i], color=COLOURS[i], ms=9 - 2 * i, label=method)
        axes.set_title(f"layer {number}")
    row[0].set_ylabel("loss / norm of the output")
    row[-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.supxlabel(f"all subsets of {data['r']} experts, best first; calibrated on {data['corpus']}", fontsize=9)
    return figure


def _held_out(data: dict) -> Figure:
    figure, [[axes]] = canvas(4, 3.2)
    for number, layer in enumerate(data["layers"]):
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(layer["losses"], layer["held_out"], MARKERS[number % 8], color=colour, ms=3, label=f"layer {number}")
    top = max(max(layer["losses"] + layer["held_out"]) for layer in data["layers"])
    axes.plot([0, top], [0, top], color="0.6", lw=0.8)
    axes.set(
        xlabel="relative loss, calibration tokens",
        ylabel="relative loss, held-out tokens",
        title=f"every subset, r = {data['r']}",
    )
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _methods(data: dict) -> Figure:
    figure, [row] = canvas(9, 2.9, 1, 3)
    rows = data["rows"]
    full = next(r for r in rows if r["method"] == "none")
    for i, method in enumerate(("enumerate", "progressive", "frequency")):
        points = [full] + [r for r in rows if r["method"] == method]
        style = {"marker": MARKERS[i], "color": COLOURS[i], "label": method}
        row[0].plot([p["r"] for p in points], [p["perplexity"][0] for p in points], **style)
        row[1].errorbar(
            [p["r"] for p in points], [p["average"] for p in points], [p["stderr"] for p in points], capsize=2, **style
        )
    draws = [r for r in rows if r["method"] == "random"]
    for axes, value in ((row[0], lambda p: p["perplexity"][0]), (row[1], lambda p: p["average"])):
        axes.plot(
            [p["r"] + 0.12 for p in draws], [value(p) for p in draws], "x", color="0.4", label=f"random ({len(draws)} draws)"
        )
        axes.invert_xaxis()
        axes.set_xlabel("experts kept, r")
    row[0].set(ylabel=f"perplexity, {data['corpora'][0]}", title="held-out perplexity")
    log_axis(row[0])
    row[1].set(ylabel="average of the tasks, %", title="tasks (bars: standard error)")
    figure.legend(*row[1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    _paper_methods(row[2], data["paper"])
    return figure


def _paper_methods(axes, rows: list[dict]) -> None:
    rows = [r for r in rows if r["model"] == "Mixtral 8x7B"]
    names = {"enumerate": 0, "progressive": 1, "frequency": 2, "random": 7}
    full = next(r for r in rows if r["method"] == "none")
    for method, i in names.items():
        points = sorted([full] + [r for r in rows if r["method"] == method], key=lambda r: -r["r"])
        axes.plot(
            [p["r"] for p in points], [p["average"] for p in points], marker=MARKERS[i % 8], color=COLOURS[i], label=method
        )
    axes.invert_xaxis()
    axes.set(xlabel="experts kept, r", ylabel="average of 8 zero-shot tasks, %")
    axes.legend()
    of_the_paper(axes, "Mixtral 8x7B (Tables 2, 6)")


def _calibration_size(data: dict) -> Figure:
    figure, [row] = canvas(7, 2.7, 1, 2)
    row[0].plot([r["sequences"] for r in data["rows"]], [100 * (r["excess"] - 1) for r in data["rows"]], "o", color=COLOURS[0])
    row[0].set(
        xscale="log", xlabel=f"calibration sequences of {data['length']} tokens", ylabel="loss above the held-out best, %"
    )
    row[0].set_title(f"r = {data['r']}, {data['corpus']}")
    row[1].plot([r["sequences"] for r in data["paper"]], [r["average"] for r in data["paper"]], "s-", color=COLOURS[7])
    row[1].set(xscale="log", xlabel="calibration sequences of 2048 tokens", ylabel="average of 8 tasks, %")
    of_the_paper(row[1], "r = 6 (Table 7)")
    return figure


# --- 04 and 05 ------------------------------------------------------------------------------------------------------


def _ratios(data: dict) -> Figure:
    corpora = data["corpora"]
    layers = len(next(iter(corpora.values()))["betas"])
    figure, [row] = canvas(1.45 * layers + 0.8, 2.3, 1, layers, sharey=True, sharex=True)
    for number, axes in enumerate(row):
        for i, (name, corpus) in enumerate(corpora.items()):
            axes.stairs(corpus["density"][number], data["edges"], color=COLOURS[i], label=name)
            axes.axvline(corpus["betas"][number], color=COLOURS[i], ls="--", lw=1)
        axes.set_title(f"layer {number}")
    row[0].set_ylabel("density")
    row[-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.supxlabel("rho (k = 2: second routing weight over the first); dashed: the median, beta", fontsize=9)
    return figure


def _betas(data: dict) -> Figure:
    figure, [row] = canvas(8, 2.7, 1, 2, sharey=True)
    for i, (name, corpus) in enumerate(data["corpora"].items()):
        row[0].plot(corpus["betas"], marker=MARKERS[i], color=COLOURS[i], label=name)
        row[0].plot(corpus["again"], marker=MARKERS[i], color=COLOURS[i], ls=":", alpha=0.5, label="the same, another draw")
    for i, (name, values) in enumerate(data["paper"].items()):
        row[1].plot(values, marker=MARKERS[i], color=COLOURS[i], ms=3, label=name)
    for axes in row:
        axes.set_xlabel("layer")
        axes.legend()
    row[0].set(ylabel="median beta", title="this model")
    of_the_paper(row[1], "Mixtral 8x7B (A.7)")
    return figure


def _trade_off(data: dict) -> Figure:
    figure, [row] = canvas(9, 2.9, 1, 3)
    for i, r in enumerate(sorted({p["r"] for p in data["rows"]}, reverse=True)):
        points = [p for p in data["rows"] if p["r"] == r]
        seen = [100 * p["seen"] for p in points]
        style = {"marker": MARKERS[i], "color": COLOURS[i], "label": f"r = {r}"}
        row[0].plot(seen, [p["loss"] for p in points], **style)
        for corpus in (0, 1):
            row[1 + corpus].plot(seen, [p["perplexity"][corpus] for p in points], **style)
    row[0].set(ylabel="relative reconstruction loss", title=f"calibrated on {data['corpora'][0]}")
    for axes, name in zip(row[1:], data["corpora"], strict=True):
        axes.set(ylabel="perplexity, held-out", title=name)
        log_axis(axes)
    for axes in row:
        axes.set_xlabel("second experts dropped, % (100: top-1)")
    row[2].legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _skipping_layers(data: dict) -> Figure:
    figure, [row] = canvas(7, 2.5, 1, 2)
    row[0].bar(range(len(data["layers"])), [100 * layer["dropped"] for layer in data["layers"]], color=COLOURS[0])
    row[1].bar(range(len(data["layers"])), [layer["loss"] for layer in data["layers"]], color=COLOURS[1])
    row[0].set(
        xlabel="layer", ylabel="second experts dropped, %", ylim=(0, 100), title=f"beta = {data['beta']:.2f}, r = {data['r']}"
    )
    row[1].set(xlabel="layer", ylabel="loss / norm of the output", ylim=(0, 1))
    return figure


def _skipping_scores(data: dict) -> Figure:
    figure, [row] = canvas(8, 2.8, 1, 2)
    sizes = sorted({p["r"] for p in data["rows"]}, reverse=True)
    for i, (kind, label) in enumerate(SKIPPING.items()):
        points = [next(p for p in data["rows"] if p["r"] == r and p["skipping"] == kind) for r in sizes]
        at = [x + 0.25 * (i - 1) for x in range(len(sizes))]
        values, errors = [p["average"] for p in points], [p["stderr"] for p in points]
        row[0].bar(at, values, 0.23, yerr=errors, capsize=2, color=COLOURS[i], label=label)
    row[0].set(ylabel="average of the tasks, %", title="this model (bars: standard error)")
    paper = [p for p in data["paper"] if p["model"] == "Mixtral 8x7B"]
    for i, kind in enumerate((False, True)):
        points = [next(p["average"] for p in paper if p["r"] == r and p["skipping"] is kind) for r in (8, 6, 4)]
        row[1].bar([x + 0.25 * (i - 1) for x in range(3)], points, 0.23, color=COLOURS[i])
    row[1].set(ylabel="average of 8 tasks, %", ylim=(50, 70))
    of_the_paper(row[1], "Mixtral 8x7B (Table 5)")
    for axes, names in zip(row, (sizes, (8, 6, 4)), strict=True):
        axes.set(xticks=range(len(names)), xticklabels=[f"r = {r}" for r in names])
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _betas_of_pruned(data: dict) -> Figure:
    figure, [row] = canvas(8, 2.7, 1, 2)
    for i, (name, found) in enumerate(data["rows"].items()):
        row[0].plot(found["betas"], marker=MARKERS[i], color=COLOURS[i], label=f"{name}: perplexity {found['perplexity']:.4g}")
        row[1].plot([100 * s for s in found["shares"]], marker=MARKERS[i], color=COLOURS[i])
    row[1].axhline(50, color="0.6", lw=0.8)
    row[0].set(xlabel="layer", ylabel="median beta", title=f"r = {data['r']}, {data['corpus']}")
    row[1].set(xlabel="layer", ylabel="second experts dropped, %", title="seen on held-out text")
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=1)
    return figure


def _distances(data: dict) -> Figure:
    figure, [[axes]] = canvas(5, 2.8)
    for i, layer in enumerate(data["layers"]):
        label = f"layer {i}: mean {layer['mean']:.2f}, deviation {100 * layer['variation']:.0f}%"
        axes.stairs(layer["density"], data["edges"], color=COLOURS[i % len(COLOURS)], label=label)
    axes.set(xlabel="||f_1 - f_2|| over its mean in the layer", ylabel="density", title=data["corpus"])
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _tail_rule(data: dict) -> Figure:
    figure, [[axes]] = canvas(4.5, 2.6)
    axes.plot(data["beta"], data["left"], marker="o", ms=3, color=COLOURS[0])
    axes.axvline(data["median"], color="0.5", ls="--", label=f"median rho, {data['median']:.2f}")
    axes.set(xlabel="beta", ylabel="experts a token runs, mean", ylim=(0, data["k"] + 0.5))
    axes.set_title(f"tail rule, {data['k']} of {data['n']} experts, random weights")
    axes.legend()
    return figure


# --- 06 -------------------------------------------------------------------------------------------------------------


SIZE_LABELS = ["r = 8\n(2 GPUs)", "r = 6\n(1 GPU)", "r = 4\n(1 GPU)"]  # of the paper


def _groups(axes, names: Sequence[str], groups: dict[str, Sequence[float]], fmt: str) -> None:
    """Bars side by side: one group for each of `names`, one colour for each of `groups`."""
    width = 0.85 / len(groups)
    for i, (label, values) in enumerate(groups.items()):
        at = [x + width * (i - (len(groups) - 1) / 2) for x in range(len(names))]
        axes.bar_label(axes.bar(at, values, 0.9 * width, color=COLOURS[i], label=label), fmt=fmt, fontsize=7)
    axes.set(xticks=range(len(names)), xticklabels=names)
    axes.set_ylim(0, 1.4 * axes.dataLim.y1)  # room for the legend
    axes.legend(loc="upper left", ncols=2, fontsize=7)


def _memory_and_speed(data: dict) -> Figure:
    figure, grid = canvas(9.6, 6, 2, 3)
    (memory, speed, protocol), (paper_memory, gains, paper_speed) = grid
    rows, first = data["rows"], data["rows"][0]
    names = [f"r = {row['r']}" for row in rows]
    on_gpu = first["memory"]["peak_mib"] is not None
    held = [row["memory"]["peak_mib" if on_gpu else "weights_mib"] for row in rows]
    memory.bar_label(memory.bar(names, held, color=COLOURS[7]), fmt="%.0f", fontsize=8)
    memory.margins(y=0.1)
    memory.set(ylabel="MiB", title=("peak on the GPU" if on_gpu else "weights") + f", {data['dtype']}, random weights")
    one = [row["decoding"]["1, compiled" if "1, compiled" in row["decoding"] else "1"] for row in rows]
    kinds = {kind: [found["tokens_per_second"][kind] for found in one] for kind in one[0]["tokens_per_second"]}
    _groups(speed, names, kinds, "%.1f")
    speed.set(ylabel="tokens per second, batch 1", title=f"decoding, {data['device']}")
    base = first["protocol"]["again"]  # the first run alone is cold
    runs = {"no skipping": "stock", "skipping": "skipping"}
    ours = {label: [base / row["protocol"][kind] for row in rows] for label, kind in runs.items()}
    _groups(protocol, names, ours, "%.2fx")
    protocol.set(ylabel="speed-up", title="the paper's protocol, on one device")
    for i, (row, marker) in enumerate(zip(rows, MARKERS, strict=False)):
        batches = [found for found in row["decoding"].values() if not found["compiled"]]
        at = [found["batch"] for found in batches]
        gains.plot(at, [found["gain"] for found in batches], marker=marker, color=COLOURS[i], label=f"r = {row['r']}")
        gains.plot(at, [found["limit_gain"] for found in batches], ":", color=COLOURS[i])
    gains.axhline(1, color="0.7", lw=0.8, zorder=0)
    gains.set(xscale="log", xticks=at, xticklabels=at, xlabel="batch size", ylabel="gain from skipping")
    gains.set_title("over the faster baseline (dotted: limit)")
    gains.minorticks_off()
    gains.legend(fontsize=7)
    paper = [row for row in data["paper_memory"] if row["method"] != "wanda 2:4"]
    bars = paper_memory.bar(SIZE_LABELS, [row["memory_mib"] for row in paper], color=COLOURS[7])
    paper_memory.bar_label(bars, fmt="%.0f", fontsize=8)
    paper_memory.margins(y=0.1)
    paper_memory.set_ylabel("MiB, summed over GPUs")
    of_the_paper(paper_memory, "memory (Table 9)")
    base_model = [row for row in data["paper_speed"] if row["model"] == "Mixtral 8x7B"]
    theirs = {label: [r["speedup"] for r in base_model if r["skipping"] is (label == "skipping")] for label in runs}
    _groups(paper_speed, SIZE_LABELS, theirs, "%.2fx")
    paper_speed.set_ylabel("speed-up")
    of_the_paper(paper_speed, "speed (Table 5)")
    return figure


def _roofline(data: dict) -> Figure:
    """Arithmetic per byte read against arithmetic per second, under what memory and arithmetic units allow."""
    figure, ((axes,),) = canvas(7, 4.2)
    points = data["points"]
    reach = [min(p["intensity"] for p in points) / 2, max(p["intensity"] for p in points) * 2]
    for (dtype, peak), style in zip(data["peaks"].items(), ("-", "--"), strict=False):
        corner = peak / data["bandwidth"]
        x = [reach[0], corner, max(reach[1], 2 * corner)]
        roof = [data["bandwidth"] * x[0] / 1e9, peak / 1e9, peak / 1e9]
        axes.plot(x, roof, style, color="0.4", label=f"{data['bandwidth'] / 1e9:.0f} GB/s, {peak / 1e9:.0f} GFLOP/s in {dtype}")
    for i, kind in enumerate(dict.fromkeys(point["kind"] for point in points)):
        mine = [point for point in points if point["kind"] == kind]
        at, rate = [p["intensity"] for p in mine], [p["flop_per_second"] / 1e9 for p in mine]
        axes.plot(at, rate, MARKERS[i], color=COLOURS[i], label=kind, ls="none")
        aside = {"xytext": (-5, 4), "ha": "right"} if i == 1 else {"xytext": (4, -9)}  # skipping lies close to the first
        for point, x, y in zip(mine, at, rate, strict=True):
            axes.annotate(point["label"], (x, y), textcoords="offset points", fontsize=7, color=COLOURS[i], **aside)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must be read", ylabel="GFLOP per second")
    axes.set_title(f"r = 8, {data['device']}")
    axes.legend(fontsize=7, loc="lower right")
    return figure


# --- 07 to 09 -------------------------------------------------------------------------------------------------------


def panels(data: dict) -> Figure:
    """Panels of lines with bars from the least to the most over seeds, or of points; names of lines below all of them."""
    panels = data["panels"]
    columns = 2 if len(panels) == 4 else len(panels)
    figure, grid = canvas(3.2 * columns, 2.7 * (len(panels) // columns) + 0.3, len(panels) // columns, columns)
    labels: dict = {}
    for axes, panel in zip(grid.flatten(), panels, strict=True):
        for i, line in enumerate(panel.get("lines", ())):
            shown = _line(axes, i, line)
            labels.setdefault(line["label"], shown)
        for i, points in enumerate(panel.get("points", ())):
            (shown,) = axes.plot(points["x"], points["y"], MARKERS[i], color=COLOURS[i], label=points["label"])
            axes.set_xscale("symlog")
            labels.setdefault(points["label"], shown)
        axes.set(xlabel=panel["xlabel"], ylabel=panel["ylabel"], title=panel["title"])
        if panel.get("log"):
            log_axis(axes)
        if panel.get("falling"):
            axes.invert_xaxis()
        if panel.get("paper"):
            of_the_paper(axes, panel["title"])
            axes.legend(fontsize=7)
    shared = {label: shown for label, shown in labels.items() if label in _names(panels[0])}
    figure.legend(shared.values(), shared.keys(), loc="outside lower center", ncols=5)
    return figure


def _line(axes, i: int, line: dict):
    """One line with its error bars, a little beside those of the others; names in the place of numbers stand side by side."""
    named = isinstance(line["x"][0], str)
    order = range(len(line["x"])) if named else sorted(range(len(line["x"])), key=line["x"].__getitem__)
    at = list(order) if named else [line["x"][j] for j in order]
    aside = 0.012 * i * (at[-1] - at[0])
    means, least, most = ([line[end][j] for j in order] for end in ("mean", "least", "most"))
    bars = [[m - low for m, low in zip(means, least, strict=True)], [top - m for m, top in zip(means, most, strict=True)]]
    style = {"marker": MARKERS[i], "color": COLOURS[i], "capsize": 2, "ls": ":" if named else "-"}
    if named:
        axes.set_xticks(range(len(line["x"])), line["x"], fontsize=7)
    return axes.errorbar([x + aside for x in at], means, bars, label=line["label"], **style)


def _names(panel: dict) -> list[str]:
    return [one["label"] for one in panel.get("lines", panel.get("points"))]


# --- 10 -------------------------------------------------------------------------------------------------------------


def _searches(data: dict) -> Figure:
    """Losses over the best found, a point a layer; each panel a model and a number of experts kept."""
    panels = data["panels"]
    methods = [method for method in panels[-1]["ratios"] if method != "enumerate"]
    figure, [row] = canvas(1.8 * len(panels) + 0.8, 2.8, 1, len(panels), sharey=True)
    for axes, panel in zip(row, panels, strict=True):
        for i, method in enumerate(methods):
            ratios = panel["ratios"][method]
            axes.plot(ratios, [i] * len(ratios), MARKERS[i], color=COLOURS[i], alpha=0.7, label=method)
        axes.axvline(1, color="0.6", linewidth=0.8, zorder=0)
        axes.set(title=panel["title"], xscale="log", xlim=(0.9, 11), xlabel=f"loss over that\nof {panel['best']}")
        axes.set(xticks=[1, 2, 4, 8], xticklabels=[1, 2, 4, 8], yticks=range(len(methods)), yticklabels=methods)
        axes.minorticks_off()
    row[0].invert_yaxis()
    return figure


def _search_costs(data: dict) -> Figure:
    """Seconds against the number of experts: the trace, the search on it, and what enumeration would take."""
    figure, [[axes]] = canvas(5.5, 3.4)
    for i, (name, seconds) in enumerate(data["seconds"].items()):
        axes.plot(data["n"], seconds, f"-{MARKERS[i]}", color=COLOURS[i], label=name)
    axes.plot(data["n"], data["enumeration"], "--", color="0.4", label="enumeration (arithmetic)")
    axes.set(xscale="log", yscale="log", xlabel="experts, of which three quarters stay", ylabel="seconds")
    axes.set(xticks=data["n"], xticklabels=data["n"], ylim=(0.05, 1e6))
    axes.minorticks_off()
    axes.legend()
    return figure


# --- 11 -------------------------------------------------------------------------------------------------------------


def _views(data: dict) -> Figure:
    """The views of one place of the explorer's controls, below each other two by two."""
    names = list(data["views"])
    rows = -(-len(names) // 2)
    figure = NotebookFigure(figsize=(8.4, 3.1 * rows), layout="constrained")
    places = figure.subfigures(rows, 2, squeeze=False, width_ratios=(3.6, 4.8)).flatten()
    for name, place in zip(names, places, strict=False):
        VIEWS[name][1](place, data["frame"])(data["views"][name])
        place.suptitle(data["titles"][name], fontsize=10)
    return figure


FIGURES: dict[str, Callable[[dict], Figure]] = {
    "00_moe_layer": _moe_layer,
    "00_method": _method,
    "00_quickstart": _quickstart,
    "01_frequency": _frequency,
    "01_co_selection": _co_selection,
    "02_kept_experts": _kept,
    "02_divergence": _divergence,
    "03_loss_landscape": _landscape,
    "03_held_out": _held_out,
    "03_methods": _methods,
    "03_calibration_size": _calibration_size,
    "04_ratios": _ratios,
    "04_betas": _betas,
    "05_trade_off": _trade_off,
    "05_layers": _skipping_layers,
    "05_scores": _skipping_scores,
    "05_betas_of_pruned": _betas_of_pruned,
    "05_expert_distances": _distances,
    "05_tail_rule": _tail_rule,
    "06_memory_and_speed": _memory_and_speed,
    "06_roofline": _roofline,
    "07_domain_specific": panels,
    "07_betas": panels,
    "08_recovery": panels,
    "08_fine_tuning": panels,
    "09_weight_pruning": panels,
    "09_equal_bytes": panels,
    "10_searches": _searches,
    "10_search_costs": _search_costs,
    "11_explorer": _views,
}
