"""The explorer's views: axes are drawn once, and a slider step redraws only a part, in a few milliseconds."""

import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..style import COLOURS, MARKERS, STYLE

DPI = 100
SMALL = 32  # cells per side: up to this a mesh is faster, beyond it an image
DROPPED = {2: "second experts dropped, %"}  # by k

Update = Callable[[dict], list]  # sets a view's data and returns the artists that changed


def _cells(axes, rows: int, columns: int, **colours):
    """A grid of cells around whole numbers. A mesh of many cells would be slow, and would lose cells smaller than a pixel."""
    empty = np.zeros((rows, columns))
    if max(rows, columns) > SMALL:
        return axes.imshow(empty, origin="lower", aspect="auto", **colours)
    return axes.pcolormesh(np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5, empty, **colours)


def _ticks(count: int) -> range:
    return range(0, count, 1 if count <= 16 else -(-count // 8))


def _legend(figure, handles: list) -> None:
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=7)


def _kept(figure, frame: dict) -> Update:
    """The experts that stay: a grid of experts over layers, coloured by the corpus they are kept for."""
    axes, corpora, colours = figure.subplots(), frame["corpora"], {"removed": "1", "kept": "0.45"}
    if len(corpora) == 2:  # a cell's number is 1 for the first corpus, 2 for the second, and their sum for both
        only = {f"only for {name}": colour for name, colour in zip(corpora, COLOURS, strict=False)}
        colours = {"removed": "1", **only, "kept for both": "0.45"}
    cells = _cells(axes, frame["n"], frame["layers"], cmap=ListedColormap([*colours.values()]), vmin=0, vmax=len(colours) - 1)
    axes.set(xlabel="layer", ylabel="expert", xticks=_ticks(frame["layers"]), yticks=_ticks(frame["n"]))
    patches = [Patch(facecolor=colour, edgecolor="0.6", label=name) for name, colour in colours.items()]
    _legend(figure, [patches[0], patches[-1], *patches[1:-1]])

    def update(data: dict) -> list:
        numbers = np.zeros((frame["n"], frame["layers"]))
        for number, subsets in enumerate(data["kept"].values(), 1):
            for layer, subset in enumerate(subsets):
                numbers[subset, layer] += number
        cells.set_array(numbers)
        return [cells]

    return update


def _co_selection(figure, frame: dict) -> Update:
    """How often two experts are chosen together: a heatmap for each corpus, on one scale for all layers."""
    [row] = figure.subplots(1, len(frame["corpora"]), squeeze=False)
    colours = {"vmin": 0, "vmax": 100 * frame["pairs"] or 1, "cmap": "viridis"}
    grids = [_cells(axes, frame["n"], frame["n"], **colours) for axes in row]
    for axes, name in zip(row, frame["corpora"], strict=True):
        axes.set(title=name, aspect="equal", xlabel="expert", xticks=_ticks(frame["n"]), yticks=_ticks(frame["n"]))
    row[0].set_ylabel("expert")
    figure.colorbar(grids[-1], ax=list(row), label="tokens that choose both, %", shrink=0.8)

    def update(data: dict) -> list:
        for grid, table in zip(grids, data["tables"].values(), strict=True):
            grid.set_array(100 * np.array(table))
        return grids

    return update


def _curves(figure, frame: dict, what: str, places: Callable, **labels) -> Update:
    """For each corpus a line and a point. places: from the corpus's data, the line's x and y, then the point's x and y."""
    axes, lines, points = figure.subplots(), [], []
    axes.set(**labels)
    for i, name in enumerate(frame["corpora"]):
        lines += axes.plot([], [], color=COLOURS[i], lw=1.5)
        points += axes.plot([], [], MARKERS[i], color=COLOURS[i], ms=9, mec="black", label=f"{what}, {name}")
    _legend(figure, points)

    def update(data: dict) -> list:
        for line, point, one in zip(lines, points, data["corpora"].values(), strict=True):
            xs, ys, x, y = places(one)
            line.set_data(xs, ys)
            point.set_data([x], [y])
        return [*lines, *points]

    return update


def _landscape(figure, frame: dict) -> Update:
    """The losses of all subsets, best first, and the chosen subset among them."""

    def places(one: dict) -> tuple:
        return np.linspace(0, 100, len(one["losses"])), one["losses"], 100 * one["better"] / max(1, one["others"]), one["loss"]

    labels = {"xlabel": "all subsets, best first, %", "ylabel": "loss / norm of the output"}
    return _curves(figure, frame, "chosen", places, xlim=(-3, 103), ylim=(0, 1.05 * frame["landscape"] or 1), **labels)


def _skipping(figure, frame: dict) -> Update:
    """Over layers the share of droppable pairs that is skipped, and the loss of pruning and skipping together."""
    row, layers, lines = figure.subplots(1, 2), range(frame["layers"]), {"dropped": [], "loss": []}
    for axes, some in zip(row, lines.values(), strict=True):
        axes.set(xlabel="layer", xticks=_ticks(frame["layers"]), xlim=(-0.5, frame["layers"] - 0.5))
        for i, name in enumerate(frame["corpora"]):
            some += axes.plot(layers, [0] * len(layers), f"-{MARKERS[i]}", color=COLOURS[i], label=name)
    row[0].set(ylabel=DROPPED.get(frame["k"], "pairs dropped, %"), ylim=(-4, 104))
    row[1].set(ylabel="loss / norm of the output", ylim=(0, 1.05 * frame["loss"] or 1))
    _legend(figure, lines["dropped"])

    def update(data: dict) -> list:
        for i, one in enumerate(data["corpora"].values()):
            lines["dropped"][i].set_ydata(100 * np.array(one["dropped"]))
            lines["loss"][i].set_ydata(one["loss"])
        return [*lines["dropped"], *lines["loss"]]

    return update


def _trade_off(figure, frame: dict) -> Update:
    """The mean loss over layers against the share that is skipped, and the place of the controls."""

    def places(one: dict) -> tuple:
        return 100 * np.array(one["dropped"]), one["loss"], 100 * one["now"][0], one["now"][1]

    labels = {"xlabel": DROPPED.get(frame["k"], "pairs dropped, %"), "ylabel": "mean loss / norm of the output"}
    return _curves(figure, frame, "now", places, xlim=(-4, 104), ylim=(0, 1.05 * frame["loss"] or 1), **labels)


class View(NamedTuple):
    """A view: its size in inches, the function that draws it on a figure, the parts of a choice that change it, and the
    beginning of its title."""

    size: tuple[float, float]
    draw: Callable[[Figure, dict], Update]
    parts: tuple[str, ...]
    title: str


SEARCH = ("method", "mix", "residual")
VIEWS = {
    "kept": View((3.6, 3.1), _kept, ("r", *SEARCH), "experts kept"),
    "co_selection": View((4.8, 3.1), _co_selection, ("layer",), "experts chosen together"),
    "landscape": View((3.6, 3.1), _landscape, ("r", *SEARCH, "layer"), "loss of all subsets"),
    "skipping": View((4.8, 3.1), _skipping, ("r", *SEARCH, "skip"), "layer by layer"),
    "trade_off": View((3.6, 3.1), _trade_off, ("r", *SEARCH, "skip"), "mean loss"),
}


class Stage:
    """One of `VIEWS`. Its axes are drawn once; each picture draws only the changed artists on top, in a few milliseconds.

    frame: the names and ranges that all pictures share, see `grid.Explorer.frame`.
    """

    def __init__(self, name: str, frame: dict):
        view = VIEWS[name]
        with matplotlib.rc_context(STYLE):
            self.figure = Figure(figsize=view.size, layout="constrained", dpi=DPI)
            self.canvas = FigureCanvasAgg(self.figure)
            self.update, self.ground = view.draw(self.figure, frame), None

    def png(self, data: dict) -> bytes:
        """The picture of a view's data, which come from `grid.Explorer.view`."""
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
    """Pixels (height, width, 3), uint8, as a PNG whose rows have no filter: writing and reading take half the time.

    Pillow tries every filter on every row (ISO/IEC 15948, section 9), which helps photographs but not these pictures.
    """
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each row begins with its filter type, 0
    for channel in range(3):
        rows[:, 1 + channel :: 3] = pixels[:, :, channel]
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows, 1), b"IEND": b""}.items()
    packed = (struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)
