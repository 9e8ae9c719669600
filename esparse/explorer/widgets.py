"""The controls of an `Explorer`, the pictures that they change, and every number as text. `grid` computes, `views` draws.

Only features common to ipywidgets 7.7 and 8 are used, since Colab has its own version. A screen reader cannot name a
slider, and JupyterLab intercepts its arrow keys. So a labelled number field is linked to each slider in the page.
"""

import asyncio
import base64
import html
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import lru_cache, partial
from pathlib import Path

import ipywidgets

from .grid import MIXTRAL, SHARES, Choice, Explorer
from .views import DPI, VIEWS, Stage

CONTROLS = ("r", "method", "layer", "skip")
SKIPPING = ("a share of the pairs", "one beta", "a beta for each layer")
# JupyterLab may send a control's messages to different threads of the kernel: only one draws at a time.
LOCK = threading.RLock()
AHEAD = 0.1  # seconds after a step before drawing ahead: longer than the repeat time of a held key
_NAMED = {"style": {"description_width": "10em"}, "layout": ipywidgets.Layout(width="21em")}


class Slider:
    """A slider and a labelled number field. `value` is one of `values`, which are evenly spaced."""

    def __init__(self, label: str, values: Sequence[float], value: float):
        self.values, step = list(values), values[1] - values[0] if len(values) > 1 else 1
        ends = {"min": values[0], "max": values[-1], "step": round(step, 6), "value": value}
        kind = "Int" if isinstance(step, int) else "Float"
        self.number = getattr(ipywidgets, f"Bounded{kind}Text")(description=label, **ends, **_NAMED)
        self.slider = getattr(ipywidgets, f"{kind}Slider")(readout=False, **ends)
        ipywidgets.jslink((self.slider, "value"), (self.number, "value"))
        self.box = ipywidgets.HBox([self.number, self.slider])

    @property
    def value(self) -> float:
        return min(self.values, key=lambda value: abs(value - self.slider.value))

    @value.setter
    def value(self, value: float) -> None:
        self.slider.value = value

    def observe(self, call: Callable, _name: str = "value") -> None:
        def changed(change) -> None:
            if abs(self.slider.value - self.value) > 1e-9:  # a number typed between two values: show the nearest value
                self.slider.value = self.value
            else:
                call(change)

        self.slider.observe(changed, "value")

    def show(self, shown: bool) -> None:
        self.box.layout.display = None if shown else "none"


def _buttons(label: str, options: Sequence[str]) -> ipywidgets.ToggleButtons:
    """A choice of one word. JupyterLab intercepts the arrow keys of lists and radio buttons; buttons keep Tab and Space."""
    style = {"description_width": "10em", "button_width": "initial"}
    return ipywidgets.ToggleButtons(options=options, value=options[0], description=label, style=style)


class Dashboard:
    """The controls of an explorer and the views they change; a notebook displays `widget`.

    If a change fails, the page shows the error in one sentence and keeps the former pictures.
    """

    def __init__(self, explorer: Explorer, views: Sequence[str] = tuple(VIEWS), controls: Sequence[str] = CONTROLS):
        self.explorer, start, skips = explorer, explorer.default, explorer.k > 1
        self.controls = [name for name in controls if name != "skip" or skips]
        self.betas = [0.5] * explorer.layers
        self.r = Slider("experts kept, r", explorer.sizes, start.r)
        self.method = _buttons("method", explorer.methods)
        self.layer = Slider("layer", range(explorer.layers), 0)
        self.mode = _buttons("skip by", SKIPPING if "layer" in self.controls else SKIPPING[:2])
        self.share = Slider("share skipped, %", [round(100 * share) for share in SHARES], 50 if "skip" in self.controls else 0)
        self.beta = Slider("beta", explorer.betas if skips else [0.0], 0.5 if skips else 0.0)
        self.message, self.readout = ipywidgets.HTML(), ipywidgets.HTML()
        self.stages = {name: Stage(name, explorer.frame) for name in views}
        # One widget for all views that change together: each widget costs a message, which takes the server milliseconds.
        self.pictures = {VIEWS[name].parts: ipywidgets.HTML() for name in views}
        self.seen: dict[tuple, Choice] = {}
        self.last, self.moved, self.turn = start, [], 0
        self._image = lru_cache(maxsize=1024)(self._draw)
        for control in (self.r, self.method, self.layer, self.mode, self.share, self.beta):
            control.observe(self._guarded(partial(self._change, control)), "value")
        boxes = {"r": [self.r.box], "method": [self.method], "layer": [self.layer.box]}
        boxes["skip"] = [self.mode, self.share.box, self.beta.box]
        wrapped = ipywidgets.Layout(display="flex", flex_flow="row wrap")
        self.widget = ipywidgets.VBox([
            *(box for name in self.controls for box in boxes[name]),
            self.message,
            ipywidgets.HBox(list(self.pictures.values()), layout=wrapped),
            self.readout,
        ])  # fmt: skip
        self._change(self.mode)

    def _guarded(self, call: Callable[[], None]) -> Callable:
        def changed(_change=None) -> None:
            with LOCK:
                try:
                    call()
                except Exception as error:  # any: nobody would see an error of a callback
                    self.say(f"{type(error).__name__}: {error}")

        return changed

    def say(self, sentence: str) -> None:
        self.message.value = _alert(sentence) if sentence else ""

    @property
    def choice(self) -> Choice:
        by_share = self.mode.value == SKIPPING[0]
        skip = ("share", self.share.value / 100) if by_share else ("betas", tuple(self.betas))
        return Choice(self.r.value, self.method.value, self.layer.value, skip)

    def _change(self, control) -> None:
        """Synchronise the beta slider with `betas`: it sets the beta of all layers, or of the layer that is shown."""
        self.share.show(self.mode.value == SKIPPING[0])
        self.beta.show(self.mode.value != SKIPPING[0])
        if self.mode.value == SKIPPING[1]:
            self.betas = [self.beta.value] * self.explorer.layers
        elif self.mode.value == SKIPPING[2] and control is self.beta:
            self.betas[self.layer.value] = self.beta.value
        elif self.mode.value == SKIPPING[2]:
            self.beta.value = self.betas[self.layer.value]
        self.refresh()

    def refresh(self) -> None:
        """Update the text, and the pictures that depend on a changed part of the choice."""
        choice = self.choice
        seen = {parts: self._part(choice, parts) for parts in self.pictures}
        drawn = {parts: self._images(parts, part) for parts, part in seen.items() if self.seen.get(parts) != part}
        for parts, images in drawn.items():  # together, so that the page is laid out and painted once
            self.pictures[parts].value = images
        self.seen = seen
        self.readout.value = _table(self.explorer.describe(choice), self.explorer.estimate(choice))
        everyone = f"r = {self.explorer.n} keeps every expert: nothing is pruned." if choice.r == self.explorer.n else ""
        self.say(everyone or self.explorer.note)
        self._draw_ahead(choice)

    def _part(self, choice: Choice, parts: Sequence[str]) -> Choice:
        """The default choice with only these parts replaced: choices that agree in these parts share a picture."""
        return replace(self.explorer.default, **{part: getattr(choice, part) for part in parts})

    def _images(self, parts: Sequence[str], part: Choice) -> str:
        images = (self._image(name, part) for name in self.stages if VIEWS[name].parts == parts)
        return f'<div style="display: flex; flex-flow: row wrap">{"".join(images)}</div>'

    def _draw_ahead(self, choice: Choice) -> None:
        """While the kernel is idle, draw the pictures one step away, first for the control that moved last."""
        self.moved, self.last = _moved(self.last, choice) or self.moved, choice
        layers = [choice.layer] if self.mode.value == SKIPPING[2] else range(self.explorer.layers)
        near = [other for other in self.explorer.neighbours(choice, layers) if _moved(choice, other)[0] in self.controls]
        near.sort(key=lambda other: _moved(choice, other) != self.moved)
        views = ((name, self._part(other, VIEWS[name].parts)) for other in near for name in self.stages)
        self.turn += 1
        with suppress(RuntimeError):  # outside a notebook no event loop runs
            asyncio.get_running_loop().call_later(AHEAD, self._draw_next, views, self.turn)

    def _draw_next(self, views: Iterator[tuple[str, Choice]], turn: int) -> None:
        """Draw one picture, then let the event loop handle a key pressed meanwhile, whose step ends this turn."""
        with LOCK:
            if turn == self.turn and (view := next(views, None)):
                with suppress(Exception):  # the error is raised again when the user takes that step
                    self._image(*view)
                asyncio.get_running_loop().call_later(0, self._draw_next, views, turn)

    def _draw(self, name: str, choice: Choice) -> str:
        """The view below its title, as an <img> with a text alternative, which ipywidgets' Image lacks.

        The title is HTML text: drawing it would take as long as the rest of the picture.
        """
        png = base64.b64encode(self.stages[name].png(self.explorer.view(name, choice))).decode()
        width, height = (round(DPI * side) for side in VIEWS[name].size)
        alt = html.escape(self.explorer.caption(name, choice), quote=True)
        # "sync" decodes the image together with the change, so that no frame is blank.
        image = f'<img decoding="sync" width="{width}" height="{height}" alt="{alt}" src="data:image/png;base64,{png}">'
        title = f"<figcaption>{html.escape(self.explorer.title(name, choice))}</figcaption>"
        return f'<figure style="margin: 0; text-align: center; line-height: 1.5">{title}{image}</figure>'


def _moved(one: Choice, other: Choice) -> list[str]:
    return [field.name for field in fields(Choice) if getattr(one, field.name) != getattr(other, field.name)]


def _alert(sentence: str) -> str:
    return f'<p role="alert"><b>{html.escape(sentence)}</b></p>'


def _table(described: Mapping[str, Mapping[str, str]], estimate: Mapping[str, str]) -> str:
    """A column of numbers for each corpus, and below them the estimate for a real model."""
    cell = lambda text, wide=1: f'<td colspan="{wide}">{html.escape(text)}</td>'  # noqa: E731
    head = lambda text, scope: f'<th scope="{scope}">{html.escape(text)}</th>'  # noqa: E731
    rows = ["<td></td>" + "".join(head(corpus, "col") for corpus in described)]
    for name in next(iter(described.values())):
        rows.append(head(name, "row") + "".join(cell(words[name]) for words in described.values()))
    rows += [head(name, "row") + cell(words, len(described)) for name, words in estimate.items()]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<table style="text-align: left; line-height: 1.3">{body}</table>'


class _Export:
    """A button that writes the chosen plan, fields for file name and corpus, and then the commands that use the file."""

    def __init__(self, board: Dashboard):
        self.board = board
        self.path = ipywidgets.Text(value="plan.json", description="write plan to", **_NAMED)
        self.corpus = _buttons("calibrated on", list(board.explorer.grids))
        self.button = ipywidgets.Button(description="Export plan")
        self.written = ipywidgets.HTML()
        self.button.on_click(board._guarded(self.write))
        self.widget = ipywidgets.VBox([self.corpus, ipywidgets.HBox([self.path, self.button]), self.written])

    def write(self) -> None:
        path, explorer = Path(self.path.value), self.board.explorer
        plan = explorer.plan(self.corpus.value, self.board.choice)
        try:
            plan.save(path)
        except FileExistsError:
            raise ValueError(f"{path} already exists: choose another name.") from None
        self.board.say("")
        lines = "".join(f"<pre>{html.escape(command)}</pre>" for command in explorer.commands(path.resolve()))
        self.written.value = f'<div role="status">{html.escape(str(path))} is written.{lines}</div>'


class Page:
    """The whole explorer: a field for the folders of other traces, a dashboard with every view, and an export."""

    def __init__(self, traces: Explorer | Mapping, folder: str | Path | None = None):
        self.folder, self.shape = folder, traces.shape if isinstance(traces, Explorer) else MIXTRAL
        self.path = ipywidgets.Text(
            placeholder="a folder that Trace.save wrote, or two: one; other",
            description="another trace",
            continuous_update=False,
            style={"description_width": "10em"},
            layout=ipywidgets.Layout(width="38em"),
        )
        self.message, self.body = ipywidgets.HTML(), ipywidgets.VBox()
        self.path.observe(lambda _change: self.open(self._typed()), "value")
        self.widget = ipywidgets.VBox([self.path, self.message, self.body])
        self.open(traces)

    def _typed(self) -> dict[str, str]:
        folders = [folder.strip() for folder in self.path.value.split(";") if folder.strip()] or [""]
        names = [Path(folder).name for folder in folders]
        if len(set(names)) < len(names):  # two folders may have the same name
            names = [f"{name} ({number})" for number, name in enumerate(names, 1)]
        return dict(zip(names, folders, strict=True))

    def open(self, traces: Explorer | Mapping) -> None:
        """Show these traces. If they cannot be read, the page says why in one sentence and keeps the former ones."""
        self.message.value = '<p role="status">Reading, and computing once what the sliders will show...</p>'
        try:
            explorer = traces if isinstance(traces, Explorer) else Explorer(traces, self.folder, shape=self.shape)
            self.dashboard = Dashboard(explorer)
        except (ValueError, OSError) as error:
            self.message.value = _alert(str(error))
            return
        except Exception as error:  # any damage in a file: nobody would see an error of a callback
            self.message.value = _alert(
                f"This trace is damaged or of another version ({type(error).__name__}: {error}): trace again."
            )
            return
        self.export = _Export(self.dashboard)
        self.body.children, self.message.value = (self.dashboard.widget, self.export.widget), ""


def panel(source, views: Sequence[str] = tuple(VIEWS), controls: Sequence[str] = CONTROLS) -> ipywidgets.Widget:
    """Some views and controls of an `Explorer` or of a run, for a notebook on one subject.

    panel(run, views=["kept"], controls=["r", "method"])
    """
    return Dashboard(source if isinstance(source, Explorer) else source.explorer(), views, controls).widget


def dashboard(source, folder: str | Path | None = None) -> ipywidgets.Widget:
    """The dashboard over one trace, or two side by side.

        dashboard(run)
        dashboard({"web": "traces/web", "arithmetic": "traces/arithmetic"})

    source: an `Explorer`, a run, or `Trace`s (or their folders) by corpus name. folder: where the computed grids
    are stored. If a trace cannot be read, the page says so in one sentence.
    """
    return Page(source if isinstance(source, Explorer | Mapping) else source.explorer(), folder).widget
