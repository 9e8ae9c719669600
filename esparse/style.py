"""The one style of all figures: colours that colour-blind readers tell apart, with markers beside them.

The paper's numbers stand in panels of their own on a grey ground, so that nobody takes one for the other.
"""

import io

import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

STYLE = {
    **sns.axes_style("ticks"),
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.markersize": 5,
    "pdf.fonttype": 42,
}
COLOURS = sns.color_palette("colorblind")
MARKERS = "osD^vPX*"
PAPER_GROUND = "0.93"


class NotebookFigure(Figure):
    """A figure that Jupyter shows once, without pyplot's global state, and that says in words what it shows: as the
    picture's text alternative, and below it, since JupyterLab gives a picture none."""

    alt = "A figure."

    def __repr__(self) -> str:
        return self.alt

    def _ipython_display_(self) -> None:
        from IPython.display import display

        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=96)
        picture, words = {"image/png": buffer.getvalue()}, {"text/plain": self.alt}
        display(picture | words, raw=True, metadata={"image/png": {"alt": self.alt}})
        display({"text/markdown": f"*{self.alt}*"} | words, raw=True)


def canvas(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    figure = NotebookFigure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def log_axis(axes) -> None:
    """A logarithmic vertical axis with plain numbers, and no two of them in the same place."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def of_the_paper(axes, title: str) -> None:
    axes.set_facecolor(PAPER_GROUND)
    axes.set_title(f"the paper: {title}")
