"""Notebook 09: weight pruning beside expert pruning (Table 1, MoE-Pruner)."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..checkpoints.models import weight_bytes
from ..pruning.weights import SCOPES, WEIGHT_SCORES, equal_share
from .figures import PAST, register
from .recovery import recovered
from .run import Run
from .tables import RATIOS, measure_panels, panels, pick


def sparsity_rows(run: Run, shares: Sequence[float | str] = (0.5, 0.6, 0.7, 0.8, "2:4", "4:8")) -> Iterator[dict]:
    """Table 1: magnitude, Wanda and MoE-Pruner at every sparsity of the experts' weights, calibrated on the general corpus."""
    yield {"method": "none", "sparsity": "0"} | run.quality()
    for share, method in itertools.product(shares, WEIGHT_SCORES):
        yield {"method": method, "sparsity": str(share)} | run.sparse(run.general, share, method).quality()


def switch_rows(run: Run, share: float | str = 0.7) -> Iterator[dict]:
    """Other settings: the linear maps that are pruned, and the model (dense or pruned) whose activations are scored."""
    for scope, dense, method in itertools.product(SCOPES, (False, True), ("wanda", "moe-pruner")):
        sparse = run.sparse(run.general, share, method, scope=scope, dense=dense)
        yield {"method": method, "sparsity": str(share), "scope": scope, "dense": dense} | sparse.quality()


def equal_bytes_rows(run: Run) -> Iterator[dict]:
    """Experts against weights at equal bytes: r of n experts, and the sparsity with as many bytes, see `equal_share`."""
    for r in run.sizes:
        for method in (run.method, "frequency"):
            yield {"r": r, "method": method, "sparsity": None} | run.quality(run.plan(run.general, r, method))
        share = round(equal_share(run.experts, r), 4)
        for method in ("wanda", "moe-pruner"):
            yield {"r": r, "method": method, "sparsity": share} | run.sparse(run.general, share, method).quality()


def quantised_rows(run: Run) -> Iterator[dict]:
    """A.6: expert pruning and 8-bit weights, alone and together, with their MiB."""
    for r in (run.experts, *run.sizes):
        plan = run.plan(run.general, r) if r < run.experts else None
        whole = recovered(run, plan, {"method": "none"}, lambda model: {})[0]
        for some in (whole, replace(whole, dtype="int8")):
            about = {"r": r, "weights": some.dtype or "stored", "mib": weight_bytes(some.model) / 2**20}
            yield about | some.quality()


def sparsity_figure(run: Run, rows: Sequence[dict]) -> dict:
    """Perplexity over the share of the experts' weights that are zero, by score."""
    made, xlabels = [], {float: "sparsity", str: "zeros of each group"}
    for key, kind in itertools.product(RATIOS, xlabels):
        some = [{**row, "x": kind(row["sparsity"])} for row in rows if (":" in row["sparsity"]) is (kind is str)]
        groups = {method: pick(some, method=method) for method in WEIGHT_SCORES}
        made += measure_panels(run, [key], groups, "x", xlabel=xlabels[kind])
    return {"panels": made}


def equal_bytes_figure(run: Run, rows: Sequence[dict], full: Sequence[dict]) -> dict:
    """Experts against weights: quality over the bytes of the experts that are left."""
    names = {run.method: f"experts, {run.method}", "frequency": "experts, frequency"}
    names |= {"wanda": "weights, Wanda", "moe-pruner": "weights, MoE-Pruner"}
    whole = [{**row, "r": run.experts} for row in full]
    groups = {name: whole + pick(rows, method=method) for method, name in names.items()}
    about = {"x": lambda row: 100 * row["r"] / run.experts, "xlabel": "bytes of the experts, %", "falling": True}
    return {"panels": measure_panels(run, ("general", "domain", "average"), groups, **about)}


SPARSITY = "Perplexity on both corpora over the sparsity of the experts' weights, a line a score."
EQUAL_BYTES = "Quality over the bytes left of the experts, for pruned experts and for pruned weights."
register("09_weight_pruning", "Table 1", panels, SPARSITY)
register("09_equal_bytes", PAST, panels, EQUAL_BYTES)
