"""Sliders over a trace: what they show is computed once (`grid`), drawn (`views`) and shown (`widgets`).

In: one or two traces. Out: a widget for a notebook, from `panel` or `dashboard`.
"""


def __getattr__(name: str):
    if name not in ("panel", "dashboard"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import widgets  # imports ipywidgets, which may be missing

    return getattr(widgets, name)
