"""Controls over an `Explorer`: the pictures they change and every number in words. Nothing is computed or drawn here.

Of ipywidgets only what 7.7 and 8 share, since Colab has its own. A slider has no name that a screen reader could speak, and
JupyterLab takes its arrow keys: beside each stands a labelled number, linked to it in the page.
"""

import asyncio
import base64
import html
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path

import ipywidgets

from .explorer import MIXTRAL, SHARES, VIEWS, Choice, Explorer
from .stages import DPI, Stage
from .stages import VIEWS as SIZES

CONTROLS = ("r", "method", "layer", "skip")
SKIPPING = ("a share of the pairs", "one beta", "a beta for each layer")
# What of a choice each view depends on: nothing else draws it again.
DEPENDS = {
    "kept": ("r", "method"),
    "co_selection": ("layer",),
    "landscape": ("r", "method", "layer"),
    "skipping": ("r", "method", "skip"),
    "trade_off": ("r", "method", "skip"),
}
# JupyterLab may send one message of a control to the kernel's main thread and the next to another; one draws at a time.
LOCK = threading.RLock()
AHEAD = 0.1  # seconds after a step until the next ones are drawn: longer than a key that is held takes to repeat
_NAMED = {"style": {"description_width": "10em"}, "layout": ipywidgets.Layout(width="21em")}
_FIGURE = 'style="margin: 0; text-align: center; line-height: 1.5"'


class Slider:
    """A slider and a labelled number beside it; `value` is the one of `values`, evenly spaced, that both show."""

    def __init__(self, label: str, values: Sequence[float], value: float):
        self.values, step = list(values), values[1] - values[0] if len(values) > 1 else 1
        ends = {"min": values[0], "max": values[-1], "step": round(step, 6), "value": value}
        whole = isinstance(step, int)
        number, slider = (
            (ipywidgets.BoundedIntText, ipywidgets.IntSlider)
            if whole
            else (ipywidgets.BoundedFloatText, ipywidgets.FloatSlider)
        )
        self.number, self.slider = number(description=label, **ends, **_NAMED), slider(readout=False, **ends)
        ipywidgets.jslink((self.slider, "value"), (self.number, "value"))
        self.box = ipywidgets.HBox([self.number, self.slider])

    @property
    def value(self) -> float:
        return min(self.values, key=lambda value: abs(value - self.slider.value))

    @value.setter
    def value(self, value: float) -> None:
        self.slider.value = value

    def observe(self, call: Callable) -> None:
        def changed(change) -> None:
            if abs(self.slider.value - self.value) > 1e-9:  # typed, between two values: both show the nearest
                self.slider.value = self.value
            else:
                call(change)

        self.slider.observe(changed, "value")

    def show(self, shown: bool) -> None:
        self.box.layout.display = None if shown else "none"


def _buttons(label: str, options: Sequence[str]) -> ipywidgets.ToggleButtons:
    """One of a few words. JupyterLab takes the arrow keys of lists and radio buttons; buttons keep Tab and Space."""
    return ipywidgets.ToggleButtons(
        options=options, value=options[0], description=label, style={"description_width": "10em", "button_width": "initial"}
    )


class Dashboard:
    """The controls of one explorer and what they show; `widget` is what a notebook displays.

    An error while something changes is shown in the page, in one sentence, and what was there before stays.
    """

    def __init__(self, explorer: Explorer, views: Sequence[str] = VIEWS, controls: Sequence[str] = CONTROLS):
        self.explorer, start = explorer, explorer.default
        self.controls = [name for name in controls if name != "skip" or explorer.k > 1]
        self.betas = [0.5] * explorer.layers
        self.r = Slider("experts kept, r", explorer.sizes, start.r)
        self.method = _buttons("method", explorer.methods)
        self.layer = Slider("layer", range(explorer.layers), 0)
        self.mode = _buttons("skip by", SKIPPING if "layer" in self.controls else SKIPPING[:2])
        self.share = Slider("share skipped, %", [round(100 * share) for share in SHARES], 50 if "skip" in self.controls else 0)
        self.beta = Slider("beta", explorer.betas if explorer.k > 1 else [0.0], 0.5 if explorer.k > 1 else 0.0)
        self.beta.show(False)
        self.message, self.readout = ipywidgets.HTML(), ipywidgets.HTML()
        self.stages = {name: Stage(name, explorer.frame) for name in views}
        # One for all that change together: each widget is a message, and takes the server some milliseconds.
        self.pictures = {DEPENDS[name]: ipywidgets.HTML() for name in views}
        self.seen: dict[tuple, Choice] = {}
        self.last, self.moved, self.turn = start, [], 0
        self._image = lru_cache(maxsize=1024)(self._draw)
        self._listen()
        boxes = {"r": [self.r.box], "method": [self.method], "layer": [self.layer.box]}
        boxes["skip"] = [self.mode, self.share.box, self.beta.box]
        wrapped = ipywidgets.Layout(display="flex", flex_flow="row wrap")
        self.widget = ipywidgets.VBox([
            *(box for name in self.controls for box in boxes[name]),
            self.message,
            ipywidgets.HBox(list(self.pictures.values()), layout=wrapped),
            self.readout,
        ])  # fmt: skip
        self.refresh()

    def _listen(self) -> None:
        calls = {self.mode: self._change_mode, self.beta: self._change_beta, self.layer: self._change_layer}
        for control in (self.r, self.method, self.layer, self.mode, self.share, self.beta):
            call = self._guarded(calls.get(control, self.refresh))
            control.observe(call) if isinstance(control, Slider) else control.observe(call, "value")

    def _guarded(self, call: Callable[[], None]) -> Callable:
        def changed(_change=None) -> None:
            with LOCK:
                try:
                    call()
                except Exception as error:  # whatever it is: a callback's error would be seen nowhere
                    self.say(f"{type(error).__name__}: {error}")

        return changed

    def say(self, sentence: str) -> None:
        self.message.value = _alert(sentence) if sentence else ""

    # --- what changed ---

    @property
    def choice(self) -> Choice:
        betas = self.mode.value != SKIPPING[0]
        skip = ("betas", tuple(self.betas)) if betas else ("share", self.share.value / 100)
        return Choice(self.r.value, self.method.value, self.layer.value, skip)

    def _change_mode(self) -> None:
        betas = self.mode.value != SKIPPING[0]
        self.share.show(not betas)
        self.beta.show(betas)
        if self.mode.value == SKIPPING[1]:
            self.betas = [self.beta.value] * self.explorer.layers
        elif self.mode.value == SKIPPING[2]:
            self.beta.value = self.betas[self.layer.value]
        self.refresh()

    def _change_beta(self) -> None:
        if self.mode.value == SKIPPING[2]:
            self.betas[self.layer.value] = self.beta.value
        elif self.mode.value == SKIPPING[1]:
            self.betas = [self.beta.value] * self.explorer.layers
        self.refresh()

    def _change_layer(self) -> None:
        if self.mode.value == SKIPPING[2]:
            self.beta.value = self.betas[self.layer.value]
        self.refresh()

    def refresh(self) -> None:
        """Pictures that depend on what changed, and the words."""
        choice = self.choice
        seen = {parts: self._part(choice, parts) for parts in self.pictures}
        drawn = {parts: self._images(parts, part) for parts, part in seen.items() if self.seen.get(parts) != part}
        for parts, images in drawn.items():  # one after another, so that the page is laid out and painted once
            self.pictures[parts].value = images
        self.seen = seen
        self.readout.value = _table(self.explorer.told(choice), self.explorer.estimate(choice))
        everyone = f"r = {self.explorer.n} keeps every expert: nothing is pruned." if choice.r == self.explorer.n else ""
        self.say(everyone or self.explorer.note)
        self._expect(choice)

    def _part(self, choice: Choice, parts: Sequence[str]) -> Choice:
        """As much of a choice as a view depends on: two that agree in it share a picture."""
        return replace(self.explorer.default, **{part: getattr(choice, part) for part in parts})

    def _images(self, parts: Sequence[str], part: Choice) -> str:
        images = (self._image(name, part) for name in self.stages if DEPENDS[name] == parts)
        return f'<div style="display: flex; flex-flow: row wrap">{"".join(images)}</div>'

    def _expect(self, choice: Choice) -> None:
        """Draw what one step more will show while the kernel rests; what the control that moved last would, first."""
        self.moved, self.last = _moved(self.last, choice) or self.moved, choice
        layers = [choice.layer] if self.mode.value == SKIPPING[2] else range(self.explorer.layers)
        near = [other for other in self.explorer.neighbours(choice, layers) if _moved(choice, other)[0] in self.controls]
        near.sort(key=lambda other: _moved(choice, other) != self.moved)
        views = ((name, self._part(other, DEPENDS[name])) for other in near for name in self.stages)
        self.turn += 1
        with suppress(RuntimeError):  # no loop is running: this is no notebook, and nobody presses a key
            asyncio.get_running_loop().call_later(AHEAD, self._draw_next, views, self.turn)

    def _draw_next(self, views: Iterator[tuple[str, Choice]], turn: int) -> None:
        """One at a time, so that a key which is pressed meanwhile waits for no more than that; that key's step ends it."""
        with LOCK:
            if turn == self.turn and (view := next(views, None)):
                with suppress(Exception):  # whoever takes that step is told
                    self._image(*view)
                asyncio.get_running_loop().call_later(0, self._draw_next, views, turn)

    def _draw(self, name: str, choice: Choice) -> str:
        """The view below its title, as an <img> with a text alternative, which a plain image widget lacks.

        The title is text of the page: drawing it would take as long as the rest of the picture.
        """
        png = base64.b64encode(self.stages[name].png(self.explorer.view(name, choice))).decode()
        width, height = (round(DPI * side) for side in SIZES[name][0])
        alt = html.escape(self.explorer.caption(name, choice), quote=True)
        # Decoded with the change itself, so that no frame is blank.
        size = f'decoding="sync" width="{width}" height="{height}"'
        title = f"<figcaption>{html.escape(self.explorer.title(name, choice))}</figcaption>"
        return f'<figure {_FIGURE}>{title}<img {size} alt="{alt}" src="data:image/png;base64,{png}"></figure>'


def _moved(one: Choice, other: Choice) -> list[str]:
    return [field.name for field in fields(Choice) if getattr(one, field.name) != getattr(other, field.name)]


def _alert(sentence: str) -> str:
    return f'<p role="alert"><b>{html.escape(sentence)}</b></p>'


def _table(told: Mapping[str, Mapping[str, str]], estimate: Mapping[str, str]) -> str:
    """What is told of each corpus in columns, and below it what it would mean for a real model."""
    cell = lambda text, wide=1: f'<td colspan="{wide}">{html.escape(text)}</td>'  # noqa: E731
    head = lambda text, scope: f'<th scope="{scope}">{html.escape(text)}</th>'  # noqa: E731
    rows = ["<td></td>" + "".join(head(corpus, "col") for corpus in told)]
    for what in next(iter(told.values())):
        rows.append(head(what, "row") + "".join(cell(words[what]) for words in told.values()))
    rows += [head(what, "row") + cell(words, len(told)) for what, words in estimate.items()]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<table style="text-align: left; line-height: 1.3">{body}</table>'


def explore(explorer: Explorer, views: Sequence[str] = VIEWS, controls: Sequence[str] = CONTROLS) -> ipywidgets.Widget:
    """Some views and controls of an explorer, for a notebook on one subject."""
    return Dashboard(explorer, views, controls).widget


class _Export:
    """A file name, a button, and what to do with the file it writes."""

    def __init__(self, dashboard: Dashboard):
        self.dashboard, names = dashboard, list(dashboard.explorer.grids)
        self.path = ipywidgets.Text(value="plan.json", description="write plan to", **_NAMED)
        self.corpus = _buttons("calibrated on", names)
        self.button = ipywidgets.Button(description="Export plan")
        self.told = ipywidgets.HTML()
        self.button.on_click(dashboard._guarded(self.write))
        self.widget = ipywidgets.VBox([self.corpus, ipywidgets.HBox([self.path, self.button]), self.told])

    def write(self) -> None:
        path, explorer = Path(self.path.value), self.dashboard.explorer
        plan = explorer.plan(self.corpus.value, self.dashboard.choice)
        try:
            plan.save(path)
        except FileExistsError:
            raise ValueError(f"{path} already exists: choose another name.") from None
        self.dashboard.say("")
        lines = "".join(f"<pre>{html.escape(command)}</pre>" for command in explorer.commands(path.resolve()))
        self.told.value = f'<div role="status">{html.escape(str(path))} is written.{lines}</div>'


class Page:
    """The whole explorer: a field for the folders of other traces above a dashboard with every view, and an export."""

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
        if len(set(names)) < len(names):  # two folders may be called alike
            names = [f"{name} ({number})" for number, name in enumerate(names, 1)]
        return dict(zip(names, folders, strict=True))

    def open(self, traces: Explorer | Mapping) -> None:
        """Show these traces; what cannot be read is said in one sentence, and what was shown stays."""
        self.message.value = '<p role="status">Reading, and computing once what the sliders will show...</p>'
        try:
            shown = traces if isinstance(traces, Explorer) else Explorer(traces, self.folder, shape=self.shape)
            self.dashboard = Dashboard(shown)
        except (ValueError, OSError) as error:
            self.message.value = _alert(str(error))
            return
        except Exception as error:  # whatever else is wrong inside a file: a callback's error would be seen nowhere
            self.message.value = _alert(
                f"This trace is damaged or of another version ({type(error).__name__}: {error}): trace again."
            )
            return
        self.export = _Export(self.dashboard)
        self.body.children, self.message.value = (self.dashboard.widget, self.export.widget), ""


def explorer(traces: Explorer | Mapping, folder: str | Path | None = None) -> ipywidgets.Widget:
    """The dashboard over one trace, or two side by side.

        widgets.explorer(run.explorer())
        widgets.explorer({"web": "traces/web", "arithmetic": "traces/arithmetic"})

    traces: an `Explorer`, or `Trace`s or their folders by the name of their corpus. folder: where what is computed once is
    kept. A trace that cannot be read is a sentence in the page.
    """
    return Page(traces, folder).widget
