"""The command line, `python -m esparse COMMAND`: `COMMANDS` declares the options, and each command calls one function.

A command yields the lines that it prints. `main` prints them; of several processes only rank 0 does.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import esparse

STUDIES = ("criteria", "domain_specific", "recovery", "weight_pruning", "quantised")  # over training seeds
SIZES = ("small", "medium", "full")
ESTIMATED = ("method", "sequences", "length", "dtype", "batch_size")  # of the options of prune, what an estimate depends on
# The modules of the other benchmarks. Each is imported alone: a GPU machine may lack what the others need.
BENCHES = {
    "search": ".measure.search_cost",
    "stream": ".measure.streaming_cost",
    "copy": ".measure.streaming_cost",
    "scale": ".measure.scale_cost",
    "many": ".measure.search_cost",
    "scores": ".measure.scores_cost",
    "peers": ".measure.peers",
    "explorer": ".explorer.cost",
}


def _notebooks(names, settings, folder, update) -> Iterator[str]:
    from .experiments.notebooks import parse_settings, run_notebooks

    started = time.perf_counter()
    table = run_notebooks(names, settings=parse_settings(settings), folder=folder, update=update)
    reused = table.pop("reused").sum()
    yield table.to_string(index=False)
    yield f"{len(table)} notebooks, {time.perf_counter() - started:.0f} s" + f" ({reused} reused)" * bool(reused)


def _figures(names, source) -> Iterator[str]:
    from .experiments.figures import redraw

    yield from map(str, redraw(names, source))


def _data(folder, keep_model) -> Iterator[str]:
    from .files import data_folder, refuse_existing
    from .tiny_model import build
    from .tiny_model.training import RECIPES

    folder, started = folder or data_folder(), time.perf_counter()
    if not keep_model:
        for name in RECIPES:
            refuse_existing(folder / name)
        yield "Training takes more than 20 minutes on two quiet cores."
    build.write_corpora(folder)
    build.write_tasks(folder)
    if not keep_model:
        for name, recipe in RECIPES.items():
            build.write_model(folder / name, recipe)
    yield f"{folder} written in {time.perf_counter() - started:.0f} s"


def _prune(source, destination, experts, plan, dry_run, revision, **options) -> Iterator[str]:
    from .machine import is_first, join_ranks

    given = _given(options)
    if (experts is None) == (plan is None):
        raise ValueError("Say either how many experts to keep (--experts R) or which (--plan FILE).")
    if plan and (unused := given.keys() - {"dtype"}):
        without = ", ".join("--" + name.replace("_", "-") for name in given if name in unused)
        raise ValueError(f"A plan names the experts to keep, and nothing is calibrated or computed: leave out {without}.")
    join_ranks()
    plan = plan and esparse.PruningPlan.load(plan)
    if is_first():  # an estimate measures the speed of the machine, which one process should have to itself
        asked = {name: given[name] for name in ESTIMATED if name in given}
        needs = esparse.preflight(source, plan or experts, destination=destination, revision=revision, **asked)
        yield from (f"{name + ':':10}{value}" for name, value in needs.items())
    if dry_run:
        return
    report = esparse.prune_checkpoint(source, destination, plan or experts, revision=revision, **given)
    yield f"{destination}: {report['n']} to {report['r']} experts in {report['seconds']:.0f} s"
    yield f"at most {report['peak_gb']:.1f} GB of memory" + f"; left out: {report['left_out']}" * bool(report["left_out"])
    yield from _not_copied(report)
    if "skipping" in report:
        yield report["skipping"]
    if "unchecked" in report:
        yield f"not checked: {report['unchecked']}"


def _weights(source, destination, sparsity, **options) -> Iterator[str]:
    from .machine import join_ranks

    join_ranks()
    report = esparse.prune_weights_checkpoint(source, destination, sparsity, **options)
    share = report["removed"] / report["weights"]
    yield f"{destination}: {share:.1%} of {report['weights']} weights are zero, in {report['seconds']:.0f} s"
    for layer, experts in report["unrouted"].items():
        yield f"layer {layer}: no token reached the experts {experts}, which were pruned by magnitude"
    yield from _not_copied(report)


def _not_copied(report: dict) -> Iterator[str]:
    if report["not_copied"]:
        yield "not copied: " + ", ".join(f"{name} ({why})" for name, why in report["not_copied"].items())


def _evaluate(model, tasks, plan, betas, **options) -> Iterator[str]:
    from .checkpoints.models import read_betas
    from .measure.evaluation import resolve_tasks

    run = esparse.Run(model, tasks=tasks and resolve_tasks(tasks), **options)
    plan = plan and esparse.PruningPlan.load(plan)
    table = run.scores(plan, read_betas(betas) if betas else plan and plan.betas)
    yield table.to_string()
    if len(table) > 1 and table.metric.nunique() == 1:
        yield f"average {100 * table.value.mean():.2f}"


def _price(model, pruned, corpus, loss, **options) -> Iterator[str]:
    from pandas import DataFrame

    from .tracing.losses import check_loss

    check_loss(loss)
    plan = esparse.kept_experts(model, pruned)
    yield plan.label
    run = esparse.Run(model, general=corpus, keep=plan.r, **options)
    rows = esparse.price(run.trace(run.general), plan, loss=loss)
    yield DataFrame(rows, dtype=object).fillna("").to_string(index=False)


def _check(folder, against, corpora, out, **options) -> Iterator[str]:
    from .checkpoints.folder import CHECK
    from .files import SHIPPED

    out = out or (Path(folder) / CHECK if folder not in SHIPPED and Path(folder).is_dir() else None)
    found = esparse.check_folder(folder, against, corpora=corpora, out=out, **options)
    rows = [(finding.status, finding.name, _shown(finding.value)) for finding in found]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row, finding in zip(rows, found, strict=True):
        yield "  ".join([*map(str.ljust, row, widths), finding.note])
    if out:
        yield f"{out} written"
    if failed := [finding.name for finding in found if finding.status == "fail"]:
        raise ValueError(f"{folder} is not fit to be published: see {', '.join(failed)} above.")


def _shown(value) -> str:
    """The value of a finding in a few characters."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _recover(source, destination, **options) -> Iterator[str]:
    from .recovery import recover_checkpoint

    report = recover_checkpoint(source, destination, **options)
    losses = f"loss {report['losses'][0]:.3f} to {report['losses'][-1]:.3f}"
    yield f"{destination}: {report['trained']} parameters trained in {report['seconds']:.0f} s, {losses}"


def _acceptance(model, settings, folder) -> Iterator[str]:
    from pandas import DataFrame

    from .experiments.acceptance import acceptance
    from .experiments.notebooks import parse_settings

    options = {name.lower(): value for name, value in parse_settings(settings).items()}
    yield DataFrame(acceptance(model, folder=folder, **options)).to_string(index=False)


def _bench(name, out, **recipe) -> Iterator[str]:
    recipe = _given(recipe)
    if name in STUDIES:
        from dataclasses import replace

        from .experiments.seeds import bench_study
        from .tiny_model.training import RECIPES, Recipe

        known = RECIPES.get(recipe.setdefault("preset", "tiny"), Recipe())
        yield bench_study(name, out, recipe=replace(known, **recipe))
    elif recipe:
        raise ValueError(f"Only studies train models: {', '.join(STUDIES)}; {name} takes no recipe.")
    elif name in SIZES:
        from .measure.decoding import bench

        yield bench(name, out)
    else:
        yield getattr(import_module(BENCHES[name], __package__), f"bench_{name}")(out)


def _given(options: dict) -> dict:
    """The options in the command; the called function knows the defaults of the others."""
    return {name: value for name, value in options.items() if value is not None}


def _dtype(name: str):
    from .checkpoints.models import read_dtype

    try:
        return read_dtype(name)
    except ValueError as error:  # argparse drops the message of a ValueError
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


def _option(*names: str, help: str, **settings) -> tuple:
    """One argument of a command, as `add_argument` takes it; the help ends in the default, if there is one."""
    return names, settings | {"help": help + f" ({settings.get('default')})" * bool(settings.get("default"))}


def _unset(*options: tuple) -> list[tuple]:
    """Options whose defaults only the help tells, so that a command sees which were given."""
    return [(names, settings | {"default": None}) for names, settings in options]


PLAN = _option("--plan", metavar="FILE", help="the pruning plan, as prune, search_experts or the explorer saved it")
REVISION = _option("--revision", help="of the hub id")
SET = _option(
    "--set", dest="settings", action="append", default=[], metavar="NAME=VALUE", help="a parameter, such as SEQUENCES=8"
)
RUN_DIR = _option("--run-dir", dest="folder", metavar="DIR", help="where copies, traces, plans, results and figures are kept")
LENGTH = _option("--length", default=2048, type=_count, metavar="L", help="tokens of each")
SEED = _option("--seed", default=42, type=int, metavar="S", help="which documents are drawn")
LOSS = _option("--loss", default="residual", help="residual, eq3 (the paper's) or output: what a change is measured by")
DEVICE_MAP = _option("--device-map", metavar="MAP", help="such as auto")
CORPUS = "c4, math, gsm8k, web, arithmetic, a file or folder, or a mix of them such as 'code.jsonl*3+c4'"
FOLDERS = (
    _option("source", help="a local folder of safetensors, or a hub id"),
    _option("destination", help="the folder to write; absent until it is complete"),
)
CALIBRATION = (
    _option("--calibration", default="c4", metavar="CORPUS", help=CORPUS),
    _option("--sequences", default=128, type=_count, metavar="N", help="sequences of the calibration set"),
    LENGTH,
    SEED,
    _option("--dtype", type=_dtype, help="to compute in (that of most weights); of a quantised source, dequantise it"),
    _option("--device", help="where to compute (cpu), such as cuda"),
    _option("--batch-size", default=8, type=_count, metavar="B", help="sequences in one forward pass"),
    REVISION,
)
COMMANDS = {
    _notebooks: (
        "run the notebooks top to bottom, with a summary at the end",
        _option("names", nargs="*", metavar="01-06", help="numbers, ranges or names; all without"),
        *(SET, RUN_DIR),
        _option("--update", action="store_true", help="write what shows something new into notebooks/ and figures/"),
    ),
    _figures: (
        "redraw figures from their saved numbers, without a model",
        _option("names", nargs="*", metavar="NAME", help="such as 03_loss_landscape; all without"),
        _option("--from", dest="source", type=Path, metavar="DIR", help="the folder of the figures (figures/)"),
    ),
    _data: (
        "make corpora, tasks and both tiny models again, from nothing",
        _option("--folder", type=Path, help="where to (data/)"),
        _option("--keep-model", action="store_true", help="corpora and tasks only"),
    ),
    _prune: (
        "prune a checkpoint from disk to disk, one layer in memory at a time",
        *(*FOLDERS, PLAN),
        _option("--experts", type=_count, metavar="R", help="experts to keep in each layer"),
        *_unset(_option("--method", default="enumerate", help="enumerate, greedy, progressive, reap, ..."), LOSS, *CALIBRATION),
        _option("--chunk-tokens", type=_count, metavar="T", help="tokens whose expert outputs are held (as fit)"),
        *_unset(_option("--until-stable", action="store_true", help="stop calibrating a layer once its choice stays the same")),
        *_unset(_option("--skip", action="store_true", help="write the pruned model's betas: esparse and vLLM then skip")),
        _option("--dry-run", action="store_true", help="only say what it would take"),
    ),
    _weights: (
        "prune weights instead of experts, from disk to disk",
        *FOLDERS,
        _option("--sparsity", required=True, metavar="S", help="a share such as 0.5, or N:M such as 2:4"),
        _option("--method", default="moe-pruner", help="magnitude, wanda or moe-pruner"),
        _option("--scope", default="experts", help="experts, or linear: every linear map of the layers"),
        _option("--dense", action="store_true", help="score on the outputs of the dense layers"),
        *CALIBRATION,
    ),
    _evaluate: (
        "score a model through lm-eval, pruned to a plan and skipping if asked",
        _option("model", help="tiny, a local folder or a hub id"),
        _option("--tasks", nargs="+", metavar="TASK", help="tiny, paper, domain, perplexity, or lm-eval's names"),
        _option("--betas", metavar="FILE", help="JSON with one beta per MoE layer, or such a list under 'betas' (the plan's)"),
        _option("--limit", type=_count, metavar="N", help="items of each task (all; 100 for the tiny model)"),
        _option("--dtype", help="of the weights, such as bfloat16 or int8 (the checkpoint's)"),
        _option("--batch-size", type=_count, metavar="B", help="items at once (128 for the tiny model, 8 for others)"),
        *(DEVICE_MAP, PLAN, REVISION, RUN_DIR),
    ),
    _price: (
        "price a pruned folder or a plan, whoever made it, on a calibration set",
        _option("model", help="the full model: tiny, a local folder or a hub id"),
        _option("pruned", help="the pruned folder or hub id, a saved plan, or llm-compressor's report of kept experts"),
        _option("--calibration", dest="corpus", metavar="CORPUS", help=CORPUS + " (c4; web for the tiny model)"),
        _option("--sequences", type=_count, metavar="N", help="sequences of the calibration set (128; 64 for the tiny model)"),
        _option("--length", type=_count, metavar="L", help="tokens of each (2048; 256 for the tiny model)"),
        *(SEED, LOSS),
        _option("--dtype", help="of the weights, such as bfloat16 (the checkpoint's)"),
        *(DEVICE_MAP, RUN_DIR),
    ),
    _check: (
        "check a folder before it is published, alone and beside the full model",
        _option("folder", help="the folder, or a hub id"),
        _option("--against", metavar="FULL", help="the full model: tiny, a local folder or a hub id"),
        _option("--corpora", nargs="+", metavar="CORPUS", help="whose held-out text is read (c4; web arithmetic for tiny)"),
        _option("--sequences", default=16, type=_count, metavar="N", help="sequences of each corpus"),
        _option("--length", default=256, type=_count, metavar="L", help="tokens of each"),
        _option("--dtype", type=_dtype, help="of both models, such as bfloat16 (the checkpoint's)"),
        _option("--device", help="where to compute (cpu), such as cuda"),
        _option("--out", type=Path, metavar="FILE", help="the findings as JSON (check.json in the folder)"),
    ),
    _recover: (
        "train a pruned model; by default in the paper's setting (Table 4)",
        *(*FOLDERS, PLAN, LENGTH),
        _option("--method", "--rung", dest="method", default="tune", help="router, experts or tune"),
        _option("--teacher", metavar="MODEL", help="the full model, for router and experts"),
        _option("--corpus", default="metamath", help="metamath, or what prune --calibration takes"),
        _option("--sequences", default=8192, type=_count, metavar="N", help="sequences to train on"),
        _option("--steps", default=900, type=_count, metavar="N", help="of the optimiser"),
        _option("--learning-rate", default="2e-5", type=float, metavar="R", help="at its highest"),
        _option("--batch-size", default=8, type=_count, metavar="B", help="sequences a process and step"),
        _option("--dtype", type=_dtype, help="of the weights while training (the checkpoint's)"),
        _option("--seed", default=42, type=int, metavar="S", help="of the order of the data"),
    ),
    _acceptance: (
        "set a real Mixtral 8x7B beside what the paper prints for it",
        _option("model", help="a local folder, or mistralai/Mixtral-8x7B-v0.1"),
        *(SET, RUN_DIR),
    ),
    _bench: (
        "measure search, memory and speed on this machine",
        _option("name", choices=(*SIZES, *BENCHES, *STUDIES), help="what to measure, or to study over training seeds"),
        _option("--out", type=Path, metavar="FILE", help="also write the result as JSON"),
        _option("--preset", help="of a study's models: tiny, tiny-scratch, small-16 with 51 M parameters (tiny)"),
        _option("--steps", type=_count, metavar="N", help="of their training (3600)"),
        _option(
            "--dense", type=float, metavar="S", help="the share of them with one expert a layer, then copied (0; tiny: 1/6)"
        ),
        _option("--sequences", type=_count, metavar="N", help="of 256 tokens a step (8)"),
        _option("--text", nargs=2, metavar="FILE", help="two files to train on as well, general and domain"),
    ),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m esparse", description="Expert-level sparsity in MoE language models.")
    commands = parser.add_subparsers(required=True)
    for call, (help, *options) in COMMANDS.items():
        command = commands.add_parser(call.__name__.removeprefix("_"), help=help)
        command.set_defaults(call=call)
        for names, settings in options:
            command.add_argument(*names, **settings)
    return parser


def main(words: list[str] | None = None) -> int:
    """Run one command; a user's mistake ends in one sentence on standard error and exit status 2."""
    arguments = vars(_parser().parse_args(words))
    from .machine import is_first, leave_ranks  # imports torch, which the help does not need

    try:
        for line in arguments.pop("call")(**arguments):
            if is_first():
                print(line, flush=True)
        leave_ranks()  # not after a mistake: other ranks may be waiting for this one
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"esparse: {(str(error).strip() or type(error).__name__).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
