"""What a run on the real Mixtral 8x7B must show beside the paper: betas, the layers where corpora agree, memory."""

import math
import statistics
from collections.abc import Mapping, Sequence

import transformers

from .files import paper
from .layout import Layout, with_experts
from .runs import Run
from .traces import median_betas

MIB = 2**20
BETA, SIZE = 0.02, 0.02  # how far a beta may be off, and a size relatively
SIZES = (8, 6, 4)


def compare_betas(betas: Mapping[str, Sequence[float]]) -> list[dict]:
    """Each corpus's median betas beside the 32 of A.7: largest and mean difference, correlation, how many are close."""
    rows = []
    for corpus, printed in paper("betas").items():
        if corpus not in betas:
            rows.append({"what": f"betas, {corpus}", "paper": "32 betas", "here": "not measured", "as printed": False})
            continue
        here = betas[corpus]
        if len(here) != len(printed):
            raise ValueError(f"The paper prints {len(printed)} betas for {corpus}, got {len(here)}: trace Mixtral 8x7B.")
        off = [abs(a - b) for a, b in zip(here, printed, strict=True)]
        close = sum(difference <= BETA for difference in off)
        correlation = statistics.correlation(here, printed) if len(set(here)) > 1 else math.nan
        text = f"{close} of {len(off)} within {BETA}, mean off {statistics.mean(off):.3f}, most {max(off):.3f}"
        text += f", correlation {correlation:.2f}"
        rows.append({"what": f"betas, {corpus}", "paper": "32 betas", "here": text, "as printed": close == len(off)})
    return rows


def compare_layers(kept: Mapping[str, Sequence[Sequence[int]]]) -> dict:
    """The layers that keep the same experts for both corpora at r = 6, beside those of Fig. 4."""
    printed = paper("figure4")["identical_layers"]
    one, other = kept.values()
    same = [number for number, (a, b) in enumerate(zip(one, other, strict=True)) if list(a) == list(b)]
    what = f"same experts at r = 6, {' and '.join(kept)}"
    return {"what": what, "paper": f"layers {printed}", "here": f"layers {same}", "as printed": same == printed}


def compare_memory(sizes: Mapping[int, float]) -> list[dict]:
    """Weights in MiB at each r, beside the MiB that Table 9 prints, which hold a little more than weights."""
    printed = {row["r"]: row["memory_mib"] for row in paper("table9") if "wanda" not in row["method"]}
    return [
        {
            "what": f"memory at r = {r}",
            "paper": f"{printed[r]:,} MiB",
            "here": f"{size:,.0f} MiB of weights",
            "as printed": 0 <= printed[r] - size <= SIZE * printed[r],
        }
        for r, size in sizes.items()
    ]


def weights_mib(config, r: int, itemsize: int = 2) -> float:
    """The weights of the model of a config with r experts a layer, by arithmetic, in 16 bits unless told otherwise."""
    layout = Layout(with_experts(config, r), r)
    return sum(math.prod(shape) for name, shape in layout.full.items() if name not in layout.tied) * itemsize / MIB


def acceptance(model: str, *, general: str = "c4", domain: str = "math", **options) -> list[dict]:
    """Trace a model on two corpora and set what it shows beside what the paper prints for Mixtral 8x7B.

    options: further fields of `Run`, such as sequences, length, dtype, folder. Returns rows of what, paper, here, as printed.
    Made on stand-ins so far: nobody has told yet what real weights give. Raises ValueError unless there are 32 MoE layers.
    """
    run = Run(model, general=general, domain=domain, keep=[6], **options)
    labels = {run.label(corpus): corpus for corpus in (general, domain)}
    printed = dict(zip(paper("betas"), labels, strict=True))  # the general corpus stands for C4, the domain's for MATH
    betas = {name: median_betas(run.trace(labels[label])) for name, label in printed.items()}
    kept = {label: run.plan(corpus, 6).kept for label, corpus in labels.items()}
    config = transformers.AutoConfig.from_pretrained(run.source, trust_remote_code=False)
    return [*compare_betas(betas), compare_layers(kept), *compare_memory({r: weights_mib(config, r) for r in SIZES})]
