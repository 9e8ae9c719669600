"""A run on the real Mixtral 8x7B beside the paper: betas, the layers where both corpora keep the same experts, memory."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import fields

import transformers

from ..checkpoints.layout import Layout, with_experts
from ..files import paper
from ..tracing.statistics import median_betas
from .run import Run

BETA, SIZE = 0.02, 0.02  # allowed absolute error of a beta, relative error of a size


def acceptance(model: str, *, general: str = "c4", domain: str = "math", **options) -> list[dict]:
    """Trace a model on two corpora and compare it with the paper's numbers for Mixtral 8x7B.

    options: further fields of `Run`, such as sequences, length, dtype, folder. Returns the printed rows: what, paper, here.
    It has run on stand-ins only, not yet on real weights. Raises ValueError unless there are 32 MoE layers and two corpora,
    and for an unknown option.
    """
    known = {field.name for field in fields(Run)} - {"model_name", "general", "domain", "keep"}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"There is no parameter {unknown[0].upper()}: take general, domain, {', '.join(sorted(known))}.")
    run = Run(model, general=general, domain=domain, keep=[6], **options)
    labels = {run.label(corpus): corpus for corpus in (general, domain)}
    if len(labels) < 2:
        raise ValueError(f"Both corpora are called {run.label(general)}: the comparison takes two.")
    traces = map(run.trace, labels.values())  # the general corpus is compared with C4, the domain corpus with MATH
    betas = {printed: median_betas(trace) for printed, trace in zip(paper("betas"), traces, strict=True)}
    kept = {label: run.plan(corpus, 6, loss="eq3").kept for label, corpus in labels.items()}
    config = transformers.AutoConfig.from_pretrained(run.source, trust_remote_code=False)
    sizes = {r: weights_mib(config, r) for r in (8, 6, 4)}
    return [*compare_betas(betas), compare_layers(kept), *compare_memory(sizes)]


def compare_betas(betas: Mapping[str, Sequence[float]]) -> list[dict]:
    """Each corpus's median betas against the 32 of A.7: largest and mean difference, correlation, number of close ones."""
    rows = []
    for corpus, printed in paper("betas").items():
        here = betas[corpus]
        if len(here) != len(printed):
            raise ValueError(f"The paper prints {len(printed)} betas for {corpus}, got {len(here)}: trace Mixtral 8x7B.")
        off = [abs(a - b) for a, b in zip(here, printed, strict=True)]
        close = sum(difference <= BETA for difference in off)
        text = f"{close} of {len(off)} within {BETA}, mean off {statistics.mean(off):.3f}, most {max(off):.3f}"
        text += f", correlation {statistics.correlation(here, printed) if len(set(here)) > 1 else math.nan:.2f}"
        rows.append(_row(f"betas, {corpus}", "32 betas", text, close == len(off)))
    return rows


def compare_layers(kept: Mapping[str, Sequence[Sequence[int]]]) -> dict:
    """The layers that keep the same experts for both corpora at r = 6, and those of Fig. 4."""
    printed = paper("figure4")["identical_layers"]
    same = [number for number, (a, b) in enumerate(zip(*kept.values(), strict=True)) if list(a) == list(b)]
    return _row(f"same experts at r = 6, {' and '.join(kept)}", f"layers {printed}", f"layers {same}", same == printed)


def compare_memory(sizes: Mapping[int, float]) -> list[dict]:
    """Weights in MiB at each r, and the MiB of Table 9, which include a little more than weights."""
    printed = {row["r"]: row["memory_mib"] for row in paper("table9") if "wanda" not in row["method"]}
    rows = []
    for r, size in sizes.items():
        close = 0 <= printed[r] - size <= SIZE * printed[r]
        rows.append(_row(f"memory at r = {r}", f"{printed[r]:,} MiB", f"{size:,.0f} MiB of weights", close))
    return rows


def weights_mib(config, r: int) -> float:
    """MiB of a model's 16-bit weights with r experts per layer, from its config alone."""
    return Layout(with_experts(config, r), r).model.num_parameters() * 2 / 2**20


def _row(what: str, printed: str, here: str, same: bool) -> dict:
    return {"what": what, "paper": printed, "here": here, "as printed": same}
