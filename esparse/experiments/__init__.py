"""One module for each notebook: it computes the numbers on a `Run` and makes the tables and figures.

In: a notebook's parameters. Out: numbers that JSON can hold, and the figures that are drawn from them alone. `run` stores
results, `figures` is the registry, `notebooks` runs the notebooks.
"""
