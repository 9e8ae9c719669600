"""Sliders over a trace: what each shows is a plain function of its values, drawn once and then remembered."""

import base64
from collections.abc import Callable, Sequence
from functools import lru_cache

import ipywidgets

from .plots import NotebookFigure, draw
from .search import subset_losses
from .traces import Trace, dropped_share, output_norm, reconstruction_loss


def pruning_view(trace: Trace, r: int) -> tuple[dict, str]:
    """The numbers of "03_loss_landscape" at r, and a line of text: each layer's best subset and its relative loss."""
    layers, lines = [], []
    for i, layer in enumerate(trace.layers):
        subsets, losses = subset_losses(layer, r)
        relative, best = (losses / output_norm(layer)).tolist(), int(losses.argmin())
        layers.append({"losses": relative, "chosen": {"enumerate": best}})
        lines.append(f"layer {i}: keeps {', '.join(map(str, subsets[best]))}; loss {relative[best]:.3f}")
    return {"r": r, "corpus": "the trace", "layers": layers}, "<br>".join(lines)


def skipping_view(trace: Trace, kept: Sequence[Sequence[int]], beta: float) -> tuple[dict, str]:
    """The numbers of "05_layers" for one beta in every layer of a model pruned to `kept`, and a line of text."""
    rows = []
    for layer, subset in zip(trace.layers, kept, strict=True):
        loss = reconstruction_loss(layer, subset, beta) / output_norm(layer)
        rows.append({"dropped": dropped_share(layer, beta, subset), "loss": loss})
    mean = sum(row["dropped"] for row in rows) / len(rows)
    text = f"beta {beta:.2f}, r = {len(kept[0])}: {100 * mean:.0f}% of second experts dropped"
    return {"beta": beta, "r": len(kept[0]), "layers": rows}, text


def _image(figure: NotebookFigure, alt: str) -> str:
    """The figure as an <img> with alt text, which a plain image widget lacks."""
    return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(figure._repr_png_()).decode()}">'


def _explorer(figure_name: str, view: Callable[..., tuple[dict, str]], **sliders: tuple[str, Sequence[float]]):
    """Sliders with their values over an image and a text readout."""
    controls = {
        name: ipywidgets.SelectionSlider(options=list(values), description=label, continuous_update=False)
        for name, (label, values) in sliders.items()
    }
    picture, readout = ipywidgets.HTML(), ipywidgets.HTML()

    @lru_cache(maxsize=128)
    def render(*values: float) -> tuple[str, str]:
        data, text = view(**dict(zip(controls, values, strict=True)))
        return _image(draw(figure_name, data), text.split("<br>")[0]), text

    def refresh(_change=None) -> None:
        picture.value, readout.value = render(*(control.value for control in controls.values()))

    for control in controls.values():
        control.observe(refresh, "value")
    refresh()
    return ipywidgets.VBox([*controls.values(), picture, readout])


def pruning_explorer(trace: Trace):
    """A slider for r over the loss landscape of a trace."""
    layer = trace.layers[0]
    return _explorer("03_loss_landscape", lambda r: pruning_view(trace, r), r=("experts r", range(trace.keep, layer.n)))


def skipping_explorer(trace: Trace, kept_of: Callable[[int], Sequence[Sequence[int]]]):
    """Sliders for r and beta over the share dropped and the loss in each layer; `kept_of(r)` gives the subsets."""
    layer = trace.layers[0]
    return _explorer(
        "05_layers",
        lambda r, beta: skipping_view(trace, kept_of(r), beta),
        r=("experts r", range(layer.n, trace.keep - 1, -1)),
        beta=("beta", [round(0.05 * i, 2) for i in range(21)]),
    )
