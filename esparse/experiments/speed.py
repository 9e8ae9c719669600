"""Notebook 06: memory and speed (Fig. 1, Tables 1, 5 and 9)."""

from collections.abc import Sequence

from ..style import COLOURS, NotebookFigure, grouped_bars, line_style, of_the_paper
from .figures import PAST, draws
from .tables import pick

PAPER_NAMES = ["r = 8\n(2 GPUs)", "r = 6\n(1 GPU)", "r = 4\n(1 GPU)"]


def roofline(result: dict) -> dict:
    """Decoding at the largest r, and calibration, as points below the memory and arithmetic roofs.

    result: of `decoding.measure`; nothing is measured again.
    """
    row, points = result["rows"][0], []
    for batch, found in row["decoding"].items():
        for kind in ("nothing skipped", "skipping"):
            flop, read = found["step_flop"][kind], found["step_bytes"][kind]
            rate = flop * found["tokens_per_second"][kind] / found["batch"]
            points.append(_point(f"decoding, {kind}", f"batch {batch}", flop / read, rate))
    peaks = {result["dtype"]: result["flop_per_second"]}
    for row in result.get("calibration", ()):
        intensity, rate = row["flop"] / row["bytes"], row["flop"] / row["seconds"]
        points.append(_point(f"calibration ({row['dtype']})", f"r = {row['r']}", intensity, rate))
        peaks[row["dtype"]] = row["flop_per_second"]
    return {"device": result["device"], "bandwidth": result["bandwidth"], "peaks": peaks, "points": points}


def _point(kind: str, label: str, intensity: float, rate: float) -> dict:
    return {"kind": kind, "label": label, "intensity": intensity, "flop_per_second": rate}


def explanations(result: dict, paper: Sequence[dict]) -> list[dict]:
    """Possible explanations of the paper's speed-ups: each one's prediction, and the measurement here.

    paper: the rows of Table 5. All figures are ratios of tokens per second, or shares of time.
    """
    theirs = {(row["r"], row["skipping"]): row["speedup"] for row in pick(paper, model="Mixtral 8x7B")}
    one = {row["r"]: row["decoding"]["1"] for row in result["rows"]}
    plain = {r: found["tokens_per_second"]["nothing skipped"] for r, found in one.items()}
    limit, gain = one[8]["limit_gain"], theirs[8, True]
    idle = (1 - gain / limit) / (gain - 1)  # (other time) / (time reading weights) that their gain implies
    waits = f"{idle / (1 + idle):.0%} of a step at their gain from skipping"
    run = pick(result["rows"], r=8)[0]["protocol"]
    prefill, first = f"{run['prefill'] / run['stock']:.1%}", f"{run['stock'] / run['again']:.2f} times the second"
    host = f"{result['host_seconds'] * plain[8]:.0%} of a step's time"
    six, four = f"{plain[6] / plain[8]:.2f} at r = 6", f"{plain[4] / plain[6]:.2f}"
    rows = (
        ("two GPUs became one at r = 6", "1.0 on one device, whatever r", six, theirs[6, False]),
        ("locality at r = 4", "more than 1.0 from r = 6 to 4", four, theirs[4, False] / theirs[6, False]),
        ("decoding waits for the host", waits, host, gain),
        ("prefill included", "a share of the time large enough to matter", prefill, gain),
        ("no warm-up", "a first run that is slower", first, gain),
    )
    columns = ("explanation", "it predicts", "measured here", "the paper's ratio")
    return [dict(zip(columns, (*words, round(ratio, 2)), strict=True)) for *words, ratio in rows]


@draws("06_memory_and_speed", "Fig. 1, Tables 1, 5, 9")
def _memory_and_speed(figure: NotebookFigure, data: dict) -> None:
    """Six panels of bars and lines: memory, tokens per second and gains measured here, and the paper's on grey."""
    [(memory, speed, protocol), (paper_memory, gains, paper_speed)] = figure.panels(9.6, 6, 2, 3)
    rows, first, paper = data["rows"], data["rows"][0], pick(data["paper_speed"], model="Mixtral 8x7B")
    names, runs = [f"r = {row['r']}" for row in rows], {"no skipping": "stock", "skipping": "skipping"}
    on_gpu = first["memory"]["peak_mib"] is not None
    _memory_bars(memory, names, [row["memory"]["peak_mib" if on_gpu else "weights_mib"] for row in rows])
    memory.set(ylabel="MiB", title=("peak on the GPU" if on_gpu else "weights") + f", {data['dtype']}, random weights")
    one = [row["decoding"].get("1, compiled", row["decoding"]["1"])["tokens_per_second"] for row in rows]
    _speed_bars(speed, names, {kind: [found[kind] for found in one] for kind in one[0]}, "%.1f")
    speed.set(ylabel="tokens per second, batch 1", title=f"decoding, {data['device']}")
    base = first["protocol"]["again"]  # only the first run is cold
    ours = {label: [base / row["protocol"][kind] for row in rows] for label, kind in runs.items()}
    _speed_bars(protocol, names, ours, "%.2fx")
    protocol.set(ylabel="speed-up", title="the paper's protocol, on one device")
    _memory_bars(paper_memory, PAPER_NAMES, [r["memory_mib"] for r in data["paper_memory"] if r["method"] != "wanda 2:4"])
    paper_memory.set_ylabel("MiB, summed over GPUs")
    of_the_paper(paper_memory, "memory (Table 9)")
    _gains(gains, rows)
    theirs = {label: [row["speedup"] for row in pick(paper, skipping=label == "skipping")] for label in runs}
    _speed_bars(paper_speed, PAPER_NAMES, theirs, "%.2fx")
    paper_speed.set_ylabel("speed-up")
    of_the_paper(paper_speed, "speed (Table 5)")


def _memory_bars(axes, names: Sequence[str], mib: Sequence[float]) -> None:
    axes.bar_label(axes.bar(names, mib, color=COLOURS[7]), fmt="%.0f", fontsize=8)
    axes.margins(y=0.1)


def _speed_bars(axes, names: Sequence[str], groups: dict[str, Sequence[float]], fmt: str) -> None:
    for bars in grouped_bars(axes, names, groups, 0.85 / len(groups), 0.9 * 0.85 / len(groups)):
        axes.bar_label(bars, fmt=fmt, fontsize=7)
    axes.set_ylim(0, 1.4 * axes.dataLim.y1)  # room for the legend
    axes.legend(loc="upper left", ncols=2, fontsize=7)


def _gains(axes, rows: Sequence[dict]) -> None:
    for i, row in enumerate(rows):
        batches = [found for found in row["decoding"].values() if not found["compiled"]]
        at = [found["batch"] for found in batches]
        axes.plot(at, [found["gain"] for found in batches], label=f"r = {row['r']}", **line_style(i))
        axes.plot(at, [found["limit_gain"] for found in batches], ":", color=COLOURS[i])
    axes.axhline(1, color="0.7", lw=0.8, zorder=0)
    axes.set(xscale="log", xticks=at, xticklabels=at, xlabel="batch size", ylabel="gain from skipping")
    axes.set_title("over the faster baseline (dotted: limit)")
    axes.minorticks_off()
    axes.legend(fontsize=7)


@draws("06_roofline", PAST)
def _roofline(figure: NotebookFigure, data: dict) -> None:
    """Arithmetic per second over arithmetic per byte, points below the roof of memory and arithmetic."""
    [[axes]] = figure.panels(7, 4.2)
    points, bandwidth = data["points"], data["bandwidth"]
    intensities = [point["intensity"] for point in points]
    for (dtype, peak), style in zip(data["peaks"].items(), ("-", "--"), strict=False):
        x = [min(intensities) / 2, peak / bandwidth, 2 * max(*intensities, peak / bandwidth)]
        roof = [bandwidth * x[0] / 1e9, peak / 1e9, peak / 1e9]
        axes.plot(x, roof, style, color="0.4", label=f"{bandwidth / 1e9:.0f} GB/s, {peak / 1e9:.0f} GFLOP/s in {dtype}")
    for i, kind in enumerate(dict.fromkeys(point["kind"] for point in points)):
        mine = pick(points, kind=kind)
        at, rate = [point["intensity"] for point in mine], [point["flop_per_second"] / 1e9 for point in mine]
        axes.plot(at, rate, label=kind, ls="none", **line_style(i))
        aside = {"xytext": (-5, 4), "ha": "right"} if i == 1 else {"xytext": (4, -9)}  # skipping is close to the first
        for point, x, y in zip(mine, at, rate, strict=True):
            axes.annotate(point["label"], (x, y), textcoords="offset points", fontsize=7, color=COLOURS[i], **aside)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must be read", ylabel="GFLOP per second")
    axes.set_title(f"r = 8, {data['device']}")
    axes.legend(fontsize=7, loc="lower right")
