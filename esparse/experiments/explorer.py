"""Notebook 11: the explorer's views as one figure."""

from ..explorer.views import VIEWS
from ..style import NotebookFigure
from .figures import PAST, draws


@draws("11_explorer", PAST)
def _views(figure: NotebookFigure, data: dict) -> None:
    """The explorer's views at their start: experts, pairs, loss landscape, skipping, trade-off."""
    rows = -(-len(data["views"]) // 2)
    figure.set_size_inches(8.4, 3.1 * rows)
    places = figure.subfigures(rows, 2, squeeze=False, width_ratios=(3.6, 4.8)).flatten()
    for name, place in zip(data["views"], places, strict=False):
        VIEWS[name].draw(place, data["frame"])(data["views"][name])
        place.suptitle(data["titles"][name], fontsize=10)
