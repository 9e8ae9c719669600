"""The registry of figures: a function draws each figure from its saved numbers and computes nothing else.

The manifest, the gallery in `figures/README.md` and the command that redraws figures read the registry.
"""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import matplotlib.image

from ..files import checkout, read_json, write_json, write_text
from ..style import STYLE, NotebookFigure

# The modules of this room that draw figures.
EXPERIMENTS = (
    *("quickstart", "selection", "divergence", "pruning", "criteria", "betas", "skipping"),
    *("speed", "domain", "recovery", "weights", "many", "explorer"),
)
PAST = "past the paper"
DIGITS = 4  # significant digits of a figure's numbers
GALLERY = "| figure | notebook | in the paper |\n|---|---|---|\n"  # the gallery's text above this line is written by hand

Drawing = Callable[[NotebookFigure, dict], None]  # draws numbers on an empty figure


class Registered(NamedTuple):
    """A figure: the function that draws it, the paper's figure, table or section, and its text alternative."""

    draw: Drawing
    paper: str
    shows: str


_registered: dict[str, Registered] = {}


def register(name: str, paper: str, draw: Drawing, shows: str = "") -> Drawing:
    """Enter a figure in the registry, and return the function that draws it.

    name: the notebook's number and a word. paper: the paper's figure, table or section (or `PAST`). shows: the text
    alternative, if it is not the docstring of the function.
    """
    _registered[name] = Registered(draw, paper, shows or " ".join(draw.__doc__.split()))
    return draw


def draws(name: str, paper: str) -> Callable[[Drawing], Drawing]:
    """Decorator: `register` the function that draws this figure."""
    return partial(register, name, paper)


def figures() -> dict[str, Registered]:
    """Every figure, by name."""
    for module in EXPERIMENTS:
        import_module(f".{module}", __package__)
    return {name: _registered[name] for name in sorted(_registered)}


def draw(name: str, data: dict) -> NotebookFigure:
    """Draw a registered figure from its numbers. Raises ValueError for an unknown name."""
    if name not in figures():
        raise ValueError(f"There is no figure {name!r}: choose from {', '.join(figures())}.")
    with matplotlib.rc_context(STYLE):
        figure = NotebookFigure(layout="constrained")
        _registered[name].draw(figure, data)
    figure.alt = _registered[name].shows
    return figure


def rounded(data):
    """A figure's numbers as JSON holds them, rounded to `DIGITS` significant digits; large ones to whole numbers.

    These digits are the same on every CPU that was tried (torch without vectors and with AVX2, MKL's kernels for any
    processor, one and two threads). The relative difference is 5e-8 for losses, 8e-7 for betas, 3e-6 for densities. It
    is larger where rounding sends a token to another expert; see `alike`.
    """

    def shortened(text: str) -> float:
        value = float(text)
        return round(value, max(0, DIGITS - 1 - math.floor(math.log10(abs(value))))) if value else value

    return json.loads(json.dumps(data), parse_float=shortened)


def alike(one, other) -> bool:
    """Whether two figures' numbers agree: a few tokens of 16,384, routed otherwise, explain each difference.

    On another CPU, one token sent to another expert changed a perplexity by 0.06%, one on the other side of beta changed
    a loss by 0.08%, one in the next bin changed a density by 0.4%.
    """
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=5e-3, abs_tol=1e-3)
    return type(one) is type(other) and one == other


def save_figure(name: str, data: dict, folder: str | Path) -> NotebookFigure:
    """Draw a figure and save NAME.png, NAME.pdf and its `rounded` numbers, NAME.json. The picture is the same every time."""
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
    """Copy a figure and its numbers to another folder unless those there agree and look alike. Returns whether it did."""
    files = {kind: [place / f"{name}.{kind}" for place in (source, folder)] for kind in ("png", "pdf", "json")}
    if files["json"][1].exists() and alike(*(read_json(path, "figure's numbers") for path in files["json"])):
        one, other = map(matplotlib.image.imread, files["png"])
        if one.shape == other.shape and (abs(one - other) > 0.03).mean() < 1e-3:
            return False  # a number's last digit can move the edge of a curve: a thousandth of the pixels may differ
    folder.mkdir(parents=True, exist_ok=True)
    for pair in files.values():
        shutil.copyfile(*pair)
    return True


def redraw(names: Sequence[str] = (), folder: Path | None = None) -> list[Path]:
    """Draw figures again from their saved numbers; returns the PNGs. Raises FileNotFoundError where there are none."""
    folder = Path(folder) if folder else checkout() / "figures"
    names = names or sorted(path.stem for path in folder.glob("[0-9][0-9]_*.json"))
    if not names:
        raise FileNotFoundError(f"There are no figures in {folder}: run the notebooks first.")
    for name in names:
        if name in figures() and not (folder / f"{name}.json").exists():
            raise FileNotFoundError(f"There are no numbers of {name} in {folder}: run notebook {name[:2]} first.")
        save_figure(name, read_json(folder / f"{name}.json", "figure's numbers"), folder)
    if folder == checkout() / "figures":
        list_figures()
    return [folder / f"{name}.png" for name in names]


def list_figures() -> None:
    """Write the manifest and the gallery, which list all figures."""
    write_json(checkout() / "figures" / "manifest.json", manifest())
    write_text(checkout() / "figures" / "README.md", gallery())


def manifest() -> dict[str, dict[str, str]]:
    """For each figure its notebook, its place in the paper, its text alternative, its numbers and the command to redraw it."""
    return {
        name: {"notebook": _notebook(name).name, "paper": figure.paper, "shows": figure.shows}
        | {"data": f"figures/{name}.json", "command": f"python -m esparse figures {name}"}
        for name, figure in figures().items()
    }


def gallery() -> str:
    """The text of `figures/README.md`: its present introduction, a table of all figures, and the figures by notebook."""
    page = (checkout() / "figures" / "README.md").read_text(encoding="utf-8").partition(GALLERY)[0] + GALLERY
    page += "".join(f"| `{name}` | {name[:2]} | {figure.paper} |\n" for name, figure in figures().items())
    for notebook, names in itertools.groupby(figures(), _notebook):
        title = "".join(json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"]).partition("\n")[0]
        page += f"\n## [{title.removeprefix('# ')}](../notebooks/{notebook.name})\n"
        for name in names:
            figure = figures()[name]
            page += f"\n**`{name}`** ({figure.paper}). {figure.shows}\n\n![{figure.shows}]({name}.png)\n"
    return page


def _notebook(name: str) -> Path:
    return next((checkout() / "notebooks").glob(f"{name[:2]}_*.ipynb"))
