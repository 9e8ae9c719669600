"""The explorer's views: axes that are drawn once, on which a step of a slider redraws a part in a few milliseconds."""

import struct
import zlib
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .style import COLOURS, MARKERS, STYLE

DPI = 100
SMALL = 32  # cells a side: fewer are drawn faster as a mesh, more as an image

KEPT = ("removed", "kept", "kept for both", "only for {}", "only for {}")


def _kept_view(figure, frame: dict) -> Callable[[dict], list]:
    """Which experts stay: a grid of experts over layers, coloured by the corpus they are kept for."""
    [[axes]] = figure.subplots(1, 1, squeeze=False)
    shown = (0, 1) if len(frame["corpora"]) == 1 else (0, 2, 3, 4)
    colours = [(1, 1, 1), (0.45, 0.45, 0.45), (0.45, 0.45, 0.45), COLOURS[0], COLOURS[1]]
    cells = _cells(axes, frame["n"], frame["layers"], cmap=ListedColormap(colours), vmin=0, vmax=4)
    axes.set(xlabel="layer", ylabel="expert", xticks=_ticks(frame["layers"]), yticks=_ticks(frame["n"]))
    names = [KEPT[i].format(frame["corpora"][i - 3] if i > 2 else "") for i in shown]
    handles = [Patch(facecolor=colours[i], edgecolor="0.6", label=name) for i, name in zip(shown, names, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=7)

    def update(data: dict) -> list:
        layers = list(zip(*data["kept"].values(), strict=True))
        cells.set_array([[_kept_state(expert, subsets) for subsets in layers] for expert in range(frame["n"])])
        return [cells]

    return update


def _cells(axes, rows: int, columns: int, **colours):
    """A grid of cells around whole numbers. A mesh of many cells would take long, and lose those below a pixel."""
    empty = np.zeros((rows, columns))
    if max(rows, columns) > SMALL:
        return axes.imshow(empty, origin="lower", aspect="auto", **colours)
    return axes.pcolormesh(np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5, empty, **colours)


def _kept_state(expert: int, subsets: Sequence[Sequence[int]]) -> int:
    inside = [expert in subset for subset in subsets]
    if len(inside) == 1 or inside[0] == inside[1]:
        return 0 if not inside[0] else len(inside)
    return 3 if inside[0] else 4


def _ticks(count: int) -> range:
    return range(0, count, max(1, -(-count // 16)))


def _pairs_view(figure, frame: dict) -> Callable[[dict], list]:
    """How often two experts are chosen together, side by side for each corpus, on one scale for all layers."""
    [row] = figure.subplots(1, len(frame["corpora"]), squeeze=False)
    colours = {"vmin": 0, "vmax": 100 * frame["pairs"] or 1, "cmap": "viridis"}
    grids = [_cells(axes, frame["n"], frame["n"], **colours) for axes in row]
    for axes, name in zip(row, frame["corpora"], strict=True):
        axes.set(title=name, aspect="equal", xlabel="expert", xticks=_ticks(frame["n"]), yticks=_ticks(frame["n"]))
    row[0].set_ylabel("expert")
    figure.colorbar(grids[-1], ax=list(row), label="tokens that choose both, %", shrink=0.8)

    def update(data: dict) -> list:
        for grid, table in zip(grids, data["tables"].values(), strict=True):
            grid.set_array([[100 * value for value in line] for line in table])
        return grids

    return update


def _curves(figure, axes, frame: dict, what: str) -> tuple[list, list]:
    """For each corpus an empty line and the point on it that a frame moves."""
    lines = [axes.plot([], [], color=COLOURS[i], lw=1.5)[0] for i in range(len(frame["corpora"]))]
    points = [
        axes.plot([], [], MARKERS[i], color=COLOURS[i], ms=9, mec="black", label=f"{what}, {name}")[0]
        for i, name in enumerate(frame["corpora"])
    ]
    figure.legend(handles=points, loc="outside lower center", ncols=2, fontsize=7)
    return lines, points


def _landscape_view(figure, frame: dict) -> Callable[[dict], list]:
    """All subsets' losses, best first, and the one that was chosen."""
    [[axes]] = figure.subplots(1, 1, squeeze=False)
    axes.set(xlabel="all subsets, best first, %", ylabel="loss / norm of the output")
    axes.set(xlim=(-3, 103), ylim=(0, 1.05 * frame["landscape"] or 1))
    lines, points = _curves(figure, axes, frame, "chosen")

    def update(data: dict) -> list:
        for line, point, one in zip(lines, points, data["corpora"].values(), strict=True):
            last = max(1, len(one["losses"]) - 1)
            line.set_data([100 * i / last for i in range(len(one["losses"]))], one["losses"])
            point.set_data([100 * one["better"] / max(1, one["others"])], [one["loss"]])
        return [*lines, *points]

    return update


def _skipping_view(figure, frame: dict) -> Callable[[dict], list]:
    """In each layer the share of droppable pairs that is skipped, and what pruning and skipping cost together."""
    [row] = figure.subplots(1, 2, squeeze=False)
    layers = range(frame["layers"])
    lines = {}
    for axes, key in zip(row, ("dropped", "loss"), strict=True):
        lines[key] = [
            axes.plot(layers, [0] * len(layers), f"-{MARKERS[i]}", color=COLOURS[i], label=name)[0]
            for i, name in enumerate(frame["corpora"])
        ]
        axes.set(xlabel="layer", xticks=_ticks(frame["layers"]), xlim=(-0.5, frame["layers"] - 0.5))
    row[0].set(ylabel="second experts dropped, %" if frame["k"] == 2 else "pairs dropped, %", ylim=(-4, 104))
    row[1].set(ylabel="loss / norm of the output", ylim=(0, 1.05 * frame["loss"] or 1))
    figure.legend(handles=lines["dropped"], loc="outside lower center", ncols=2, fontsize=7)

    def update(data: dict) -> list:
        for i, one in enumerate(data["corpora"].values()):
            lines["dropped"][i].set_ydata([100 * value for value in one["dropped"]])
            lines["loss"][i].set_ydata(one["loss"])
        return [*lines["dropped"], *lines["loss"]]

    return update


def _trade_off_view(figure, frame: dict) -> Callable[[dict], list]:
    """What skipping more costs, over layers on average, and where the controls stand."""
    [[axes]] = figure.subplots(1, 1, squeeze=False)
    axes.set(xlabel="second experts dropped, %" if frame["k"] == 2 else "pairs dropped, %", xlim=(-4, 104))
    axes.set(ylabel="mean loss / norm of the output", ylim=(0, 1.05 * frame["loss"] or 1))
    lines, points = _curves(figure, axes, frame, "now")

    def update(data: dict) -> list:
        for line, point, one in zip(lines, points, data["corpora"].values(), strict=True):
            line.set_data([100 * value for value in one.get("dropped", [])], one.get("loss", []))
            point.set_data([100 * one["now"][0]], [one["now"][1]])
        return [*lines, *points]

    return update


VIEWS: dict[str, tuple[tuple[float, float], Callable]] = {
    "kept": ((3.6, 3.1), _kept_view),
    "co_selection": ((4.8, 3.1), _pairs_view),
    "landscape": ((3.6, 3.1), _landscape_view),
    "skipping": ((4.8, 3.1), _skipping_view),
    "trade_off": ((3.6, 3.1), _trade_off_view),
}


class Stage:
    """One of `VIEWS` whose axes are drawn once; a frame draws what its data changes on top, in a few milliseconds.

    frame: what all its pictures share, as `explorer.Explorer.frame`.
    """

    def __init__(self, name: str, frame: dict):
        size, view = VIEWS[name]
        with matplotlib.rc_context(STYLE):
            self.figure = Figure(figsize=size, layout="constrained", dpi=DPI)
            self.canvas = FigureCanvasAgg(self.figure)
            self.update, self.ground = view(self.figure, frame), None

    def png(self, data: dict) -> bytes:
        moving = self.update(data)
        if self.ground is None:
            for artist in moving:
                artist.set_animated(True)
            self.canvas.draw()
            self.ground = self.canvas.copy_from_bbox(self.figure.bbox)
        self.canvas.restore_region(self.ground)
        for artist in moving:
            artist.axes.draw_artist(artist)
        return _png(np.asarray(self.canvas.buffer_rgba())[:, :, :3])


def _png(pixels: np.ndarray) -> bytes:
    """Pixels (height, width, 3), uint8, as a PNG whose rows have no filter: half the time to write and to read.

    Pillow tries every filter on every row, which serves photographs and not these (ISO/IEC 15948, section 9).
    """
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each begins with its filter, 0
    for channel in range(3):
        rows[:, 1 + channel :: 3] = pixels[:, :, channel]
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    parts = {b"IHDR": header, b"IDAT": zlib.compress(rows, 1), b"IEND": b""}
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
