"""The style of all figures: colours that colour-blind readers can tell apart, and markers.

The paper's numbers have panels of their own with a grey ground, so that nobody takes them for ours.
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
    """A figure that Jupyter shows once, without pyplot's global state. Its text alternative is in the picture's metadata and
    also printed below it, since JupyterLab does not use the metadata."""

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

    def panels(self, width: float, height: float, rows: int = 1, columns: int = 1, **options):
        """Set the size in inches and return a grid of new axes, [rows][columns]."""
        self.set_size_inches(width, height)
        return self.subplots(rows, columns, squeeze=False, **options)


def log_axis(axes) -> None:
    """A logarithmic vertical axis with plain numbers that do not overlap."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def of_the_paper(axes, title: str, **labels) -> None:
    """Mark a panel as the paper's; labels: as for `axes.set`."""
    axes.set(title=f"the paper: {title}", facecolor=PAPER_GROUND, **labels)


def line_style(number: int) -> dict:
    """The marker and colour of a figure's i-th line."""
    return {"marker": MARKERS[number % len(MARKERS)], "color": COLOURS[number % len(COLOURS)]}


def legend_beside(axes) -> None:
    """The legend to the right of its panel."""
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def legend_below(axes, columns: int) -> None:
    """The legend of one panel below the whole figure."""
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def grouped_bars(axes, names, groups: dict, step: float, width: float, *, errors: dict | None = None, slots: int = 0) -> list:
    """Bars side by side: a tick for each name, and a colour for each group, which has one value per name. Returns the bars
    by group.

    The bars of a name are `step` apart and centred as if there were `slots` groups (0: as many as there are).
    """
    middle = ((slots or len(groups)) - 1) / 2
    axes.set_xticks(range(len(names)), names)
    drawn = []
    for i, (label, values) in enumerate(groups.items()):
        at = [x + step * (i - middle) for x in range(len(names))]
        drawn.append(axes.bar(at, values, width, yerr=errors and errors[label], capsize=2, color=COLOURS[i], label=label))
    return drawn
