"""The controls of an `Explorer`, the pictures that they change, and every number as text. `grid` computes, `views` draws.

Only features common to ipywidgets 7.7 and 8 are used, since Colab has its own version. A screen reader cannot name a
slider, and JupyterLab intercepts its arrow keys. So a labelled number field is linked to each slider in the page.
"""

import asyncio
import base64
import html
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import ipywidgets
from traitlets import Any

from .grid import MIXTRAL, SHARES, Choice, Explorer
from .views import DPI, VIEWS, Stage

CONTROLS = ("r", "method", "mix", "residual", "layer", "skip")
SKIPPING = ("a share of the pairs", "one beta", "a beta for each layer")
# JupyterLab may send a control's messages to different threads of the kernel: only one draws at a time.
LOCK = threading.RLock()
TOGETHER = 8  # layers computed from one picture to the next
AHEAD = 0.1  # seconds after a step before drawing ahead: longer than the repeat time of a held key
_NAMED = {"style": {"description_width": "10em"}, "layout": ipywidgets.Layout(width="21em")}


class Slider(ipywidgets.HBox):
    """A slider and a labelled number field. `value` is one of `values`, which are evenly spaced."""

    value = Any()

    def __init__(self, label: str, values: Sequence[float], value: float):
        self.values, step = list(values), values[1] - values[0] if len(values) > 1 else 1
        ends = {"min": values[0], "max": values[-1], "step": round(step, 6), "value": value}
        kind = "Int" if isinstance(step, int) else "Float"
        self.number = getattr(ipywidgets, f"Bounded{kind}Text")(description=label, **ends, **_NAMED)
        self.slider = getattr(ipywidgets, f"{kind}Slider")(readout=False, **ends)
        ipywidgets.jslink((self.slider, "value"), (self.number, "value"))
        super().__init__([self.number, self.slider], value=value)
        self.slider.observe(self._show, "value")
        self.observe(self._show, "value")

    def _show(self, change: Mapping) -> None:
        """Show, of a number typed between two values, the nearest value."""
        self.value = self.slider.value = min(self.values, key=lambda value: abs(value - change["new"]))


def _buttons(label: str, options: Sequence[str]) -> ipywidgets.ToggleButtons:
    """A choice of one word. JupyterLab intercepts the arrow keys of lists and radio buttons; buttons keep Tab and Space."""
    style = {"description_width": "10em", "button_width": "initial"}
    return ipywidgets.ToggleButtons(options=options, value=options[0], description=label, style=style)


class Dashboard:
    """The controls of an explorer and the views they change; a notebook displays `widget`.

    If a change fails, the page shows the error in one sentence and keeps the former pictures.
    """

    def __init__(self, explorer: Explorer, views: Sequence[str] = tuple(VIEWS), controls: Sequence[str] = CONTROLS):
        self.explorer = explorer
        enumerates = "enumerate" in explorer.methods
        useful = {"skip": explorer.k > 1, "mix": enumerates and len(explorer.grids) == 2, "residual": enumerates}
        self.controls = [name for name in controls if useful.get(name, True)]
        self.betas = [0.5] * explorer.layers
        self.r = Slider("experts kept, r", explorer.sizes, explorer.default.r)
        self.method = _buttons("method", explorer.methods)
        percent = [round(100 * share) for share in SHARES]
        self.mix, self.residual = Slider("other corpus, %", percent, 0), Slider("residual loss, %", percent, 100)
        self.layer = Slider("layer", range(explorer.layers), 0)
        self.mode = _buttons("skip by", SKIPPING if "layer" in self.controls else SKIPPING[:2])
        self.share = Slider("share skipped, %", percent, 50 if "skip" in self.controls else 0)
        self.beta = Slider("beta", explorer.betas, min(0.5, explorer.betas[-1]))
        self.message, self.readout = ipywidgets.HTML(), ipywidgets.HTML()
        self.frame, self.stages = {}, dict.fromkeys(views)
        self.worker = ThreadPoolExecutor(1)  # computes layers, so that a step does not wait for them
        # One widget for all views that change together: each widget costs a message, which takes the server milliseconds.
        self.pictures = {VIEWS[name].parts: ipywidgets.HTML() for name in views}
        self.moved, self.turn = "", 0  # the part of the choice that changed last; the number of changes
        self._image = lru_cache(maxsize=1024)(self._draw)
        boxes = {name: [getattr(self, name)] for name in ("r", "method", "mix", "residual", "layer")}
        boxes["skip"] = [self.mode, self.share, self.beta]
        for part, controls_of_part in boxes.items():
            for control in controls_of_part:
                control.observe(self._guarded(partial(self._change, part, control)), "value")
        shown = [box for part in self.controls for box in boxes[part]]
        pictures = ipywidgets.HBox([*self.pictures.values()], layout=ipywidgets.Layout(display="flex", flex_flow="row wrap"))
        self.widget = ipywidgets.VBox([*shown, self.message, pictures, self.readout])
        self._change()

    def _guarded(self, call: Callable[[], None]) -> Callable:
        def changed(_change=None) -> None:
            with LOCK:
                try:
                    call()
                except Exception as error:  # any: nobody would see an error of a callback
                    self.message.value = _alert(f"{type(error).__name__}: {error}")

        return changed

    @property
    def choice(self) -> Choice:
        skip = ("share", self.share.value / 100) if self.mode.value == SKIPPING[0] else ("betas", tuple(self.betas))
        shares = (self.mix.value / 100, self.residual.value / 100)
        return Choice(self.r.value, self.method.value, self.layer.value, skip, *shares)

    def _change(self, part: str = "", control=None) -> None:
        """Bring the controls in line with each other, then refresh the views.

        The beta slider sets the beta of all layers, or of the layer that is shown. Only enumeration has the sliders of
        mixtures. part: the part of the choice that the control changes.
        """
        mode = SKIPPING.index(self.mode.value)
        for field in (*self.mix.children, *self.residual.children):
            field.disabled = self.method.value != "enumerate"
        self.share.layout.display = "none" if mode else None
        self.beta.layout.display = None if mode else "none"
        if mode == 1:
            self.betas = [self.beta.value] * self.explorer.layers
        elif mode == 2 and control is self.beta:
            self.betas[self.layer.value] = self.beta.value
        elif mode == 2:
            self.beta.value = self.betas[self.layer.value]
        self.moved = part
        self.refresh()

    def refresh(self) -> None:
        """Update the text, and the pictures that depend on a changed part of the choice.

        In a notebook only the first pictures wait for numbers, those of one layer. The rest is computed while it is idle.
        """
        choice = self.choice
        if not (idles := _event_loop()) or not self.turn:
            self.explorer.compute(choice, [choice.layer] if idles else None)
        self._show(choice)
        self._draw_ahead(choice)

    def _show(self, choice: Choice) -> None:
        """The text and the pictures of what is computed."""
        for name in self.explorer.grids:
            self.explorer.co_selection(name, choice)  # computed here, since it may widen a range
        if self.frame != self.explorer.frame:  # at first, and where a range has grown
            self.frame = self.explorer.frame
            self.stages = {name: Stage(name, self.frame) for name in self.stages}
            self._image.cache_clear()
        shown = dict.fromkeys(self.pictures, "")
        for name in self.stages:
            shown[VIEWS[name].parts] += self.image(name, choice)
        for parts, images in shown.items():  # together, so that the page is laid out and painted once
            self.pictures[parts].value = f'<div style="display: flex; flex-flow: row wrap">{images}</div>'
        self.readout.value = _table(self.explorer.describe(choice), self.explorer.estimate(choice))
        everyone = f"r = {self.explorer.n} keeps every expert: nothing is pruned." if choice.r == self.explorer.n else ""
        self.message.value = _alert(everyone or self.explorer.note) + _progress(self.explorer, choice)

    def image(self, name: str, choice: Choice) -> str:
        """A view as HTML. Choices that agree in the parts that change the view share a picture."""
        parts = {part: getattr(choice, part) for part in VIEWS[name].parts}
        shared = replace(self.explorer.default, **parts)
        return self._image(name, shared, len(self.explorer.missing(shared)))

    def _draw_ahead(self, choice: Choice) -> None:
        self.turn += 1
        if loop := _event_loop():  # none runs outside a notebook
            loop.call_later(AHEAD, self._guarded(partial(self._draw_next, self._ahead(choice), self.turn)))

    def _ahead(self, choice: Choice) -> Iterator[tuple[str, Choice]]:
        """What to do while the kernel is idle: views to draw, and where the view is "", choices to compute in their layer.

        First comes the layer that is shown, then all that is one step away, first for the control that moved last; then the
        other layers.
        """
        if choice.layer in self.explorer.missing(choice):
            yield "", choice
            self._show(choice)
        layers = [choice.layer] if self.mode.value == SKIPPING[2] else range(self.explorer.layers)
        near = self.explorer.neighbours(choice, layers)
        for other in itertools.chain(*(near[part] for part in sorted(self.controls, key=lambda part: part != self.moved))):
            if other.layer in self.explorer.missing(other):
                yield "", other
            yield from ((name, other) for name in self.stages)
        for count, layer in enumerate(missing := self.explorer.missing(choice), 1):
            yield "", replace(choice, layer=layer)
            if count % TOGETHER == 0 or count == len(missing):
                self._show(choice)

    def _draw_next(self, views: Iterator[tuple[str, Choice]], turn: int, done: Callable[[], None] = lambda: None) -> None:
        """Draw or compute the next of `_ahead`, then let the event loop handle a key pressed meanwhile, whose step ends this
        turn. done: raises what went wrong in what was computed before."""
        if turn != self.turn:
            return
        done()
        loop, (name, choice) = asyncio.get_running_loop(), next(views, ("", None))
        if name:
            with suppress(Exception):  # the error is raised again when the user takes that step
                self.image(name, choice)
            loop.call_later(0, self._guarded(partial(self._draw_next, views, turn)))
        elif choice:
            job = loop.run_in_executor(self.worker, self._compute, choice, turn)
            job.add_done_callback(self._guarded(partial(self._draw_next, views, turn, job.result)))

    def _compute(self, choice: Choice, turn: int) -> None:
        if turn == self.turn:
            self.explorer.compute(choice, [choice.layer])

    def _draw(self, name: str, choice: Choice, _missing: int) -> str:
        """The view below its title, as an <img> with a text alternative, which ipywidgets' Image lacks.

        The title is HTML text: drawing it would take as long as the rest of the picture.
        """
        png = base64.b64encode(self.stages[name].png(self.explorer.view(name, choice))).decode()
        width, height = (round(DPI * side) for side in VIEWS[name].size)
        alt = html.escape(self.explorer.caption(name, choice), quote=True)
        # "sync" decodes the image together with the change, so that no frame is blank.
        image = f'<img decoding="sync" width="{width}" height="{height}" alt="{alt}" src="data:image/png;base64,{png}">'
        # The figure is as wide as its picture, and its title has room for two lines: a long title moves no picture.
        room = "height: 3em; display: flex; align-items: end; justify-content: center"
        title = f'<figcaption style="{room}">{html.escape(self.explorer.title(name, choice))}</figcaption>'
        return f'<figure style="margin: 0; width: {width}px; text-align: center; line-height: 1.5">{title}{image}</figure>'


def _event_loop() -> asyncio.AbstractEventLoop | None:
    """The running event loop, as in a notebook."""
    with suppress(RuntimeError):
        return asyncio.get_running_loop()
    return None


def _progress(explorer: Explorer, choice: Choice) -> str:
    if not (missing := explorer.missing(choice)):
        return ""
    known = f"{explorer.layers - len(missing)} of {explorer.layers} layers are computed"
    return f'<p role="status">{known}: the others are left blank, and not in the means.</p>'


def _alert(sentence: str) -> str:
    return f'<p role="alert"><b>{html.escape(sentence)}</b></p>' if sentence else ""


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


class Page:
    """The whole explorer: a field for the folders of other traces, a dashboard with every view, and fields to export a plan."""

    def __init__(self, traces: Explorer | Mapping, folder: str | Path | None = None):
        self.folder, self.shape = folder, traces.shape if isinstance(traces, Explorer) else MIXTRAL
        hint, wide = "a folder that Trace.save wrote, or two: one; other", {"layout": ipywidgets.Layout(width="38em")}
        self.path = ipywidgets.Text(description="another trace", placeholder=hint, continuous_update=False, **_NAMED | wide)
        self.plan_path = ipywidgets.Text(value="plan.json", description="write plan to", **_NAMED)
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
        except Exception as error:  # any damage in a file: nobody would see an error of a callback
            damaged = f"This trace is damaged or of another version ({type(error).__name__}: {error}): trace again."
            self.message.value = _alert(str(error) if isinstance(error, ValueError | OSError) else damaged)
            return
        self.corpus, self.written = _buttons("calibrated on", list(explorer.grids)), ipywidgets.HTML()
        self.button = ipywidgets.Button(description="Export plan")
        self.button.on_click(self.dashboard._guarded(self.export))
        fields = ipywidgets.VBox([self.corpus, ipywidgets.HBox([self.plan_path, self.button]), self.written])
        self.body.children, self.message.value = (self.dashboard.widget, fields), ""

    def export(self) -> None:
        """Write the chosen plan, and show the commands that use the file."""
        path, board = Path(self.plan_path.value), self.dashboard
        board.explorer.plan(self.corpus.value, board.choice).save(path)
        board.message.value = ""
        lines = "".join(f"<pre>{html.escape(command)}</pre>" for command in board.explorer.commands(path.resolve()))
        self.written.value = f'<div role="status">{html.escape(str(path))} is written.{lines}</div>'


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
