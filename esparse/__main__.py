"""The command line, `python -m esparse COMMAND`: each command is one function of the package."""

import argparse
import sys
import time
from functools import partial


def _notebooks(arguments) -> None:
    from .notebooks import parse_settings, run_notebooks

    settings = parse_settings(arguments.set)
    table = run_notebooks(arguments.names, settings=settings, folder=arguments.run_dir, update=arguments.update)
    reused = table.pop("reused")
    print(table.to_string(index=False))
    print(
        f"{len(table)} notebooks, {table.seconds[~reused].sum():.0f} s" + (f" ({reused.sum()} reused)" if reused.any() else "")
    )


def _figures(arguments) -> None:
    from .plots import redraw

    for path in redraw(arguments.names, arguments.source):
        print(path)


def _data(arguments) -> None:
    from .embedded import write_corpora, write_model, write_tasks
    from .files import data_folder, refuse_existing

    folder = arguments.folder or data_folder()
    if not arguments.keep_model:
        refuse_existing(folder / "tiny")
        print("Training takes about 20 minutes on two quiet cores.")
    started = time.perf_counter()
    write_corpora(folder)
    write_tasks(folder)
    if not arguments.keep_model:
        write_model(folder)
    print(f"{folder} written in {time.perf_counter() - started:.0f} s")


def _prune(arguments) -> None:
    from .preflight import preflight
    from .processes import is_first, join_ranks
    from .pruning import PruningPlan
    from .streaming import prune_checkpoint

    if (arguments.experts is None) == (arguments.plan is None):
        raise ValueError("Say either how many experts to keep (--experts R) or which (--plan FILE).")
    join_ranks()
    plan = PruningPlan.load(arguments.plan) if arguments.plan else None
    r = plan.r if plan else arguments.experts
    options = {"sequences": arguments.sequences, "length": arguments.length, "method": arguments.method}
    options |= {"revision": arguments.revision, "dtype": arguments.dtype, "batch_size": arguments.batch_size}
    if is_first():
        needs = preflight(arguments.source, r, destination=arguments.destination, **options)
        print("\n".join(f"{name + ':':10}{value}" for name, value in needs.items()), flush=True)
    if arguments.dry_run:
        return
    options |= {"device": arguments.device, "chunk_tokens": arguments.chunk_tokens, "seed": arguments.seed}
    report = prune_checkpoint(arguments.source, arguments.destination, plan or r, calibration=arguments.calibration, **options)
    if is_first():
        print(f"{arguments.destination}: {report['n']} to {report['r']} experts in {report['seconds']:.0f} s")
        print(
            f"at most {report['peak_gb']:.1f} GB of memory" + (f"; left out: {report['left_out']}" * bool(report["left_out"]))
        )
        _print_not_copied(report)
        if "skipping" in report:
            print(report["skipping"])


def _weights(arguments) -> None:
    from .processes import is_first, join_ranks
    from .streaming import prune_weights_checkpoint

    join_ranks()
    options = {"method": arguments.method, "scope": arguments.scope, "dense": arguments.dense, "device": arguments.device}
    options |= {"calibration": arguments.calibration, "sequences": arguments.sequences, "length": arguments.length}
    options |= {"seed": arguments.seed, "dtype": arguments.dtype, "batch_size": arguments.batch_size}
    options |= {"revision": arguments.revision}
    report = prune_weights_checkpoint(arguments.source, arguments.destination, arguments.sparsity, **options)
    if is_first():
        share = report["removed"] / report["weights"]
        print(f"{arguments.destination}: {share:.1%} of {report['weights']} weights are zero, in {report['seconds']:.0f} s")
        for layer, experts in report["unrouted"].items():
            print(f"layer {layer}: no token reached the experts {experts}, which were pruned by magnitude")
        _print_not_copied(report)


def _print_not_copied(report: dict) -> None:
    if report["not_copied"]:
        print("not copied: " + ", ".join(f"{name} ({why})" for name, why in report["not_copied"].items()))


def _evaluate(arguments) -> None:
    from .checkpoints import read_betas
    from .evaluation import resolve_tasks
    from .processes import is_first
    from .pruning import PruningPlan
    from .runs import Run

    tasks = arguments.tasks and resolve_tasks(arguments.tasks)
    run = Run(
        arguments.model,
        arguments.revision,
        arguments.dtype,
        device_map=arguments.device_map,
        tasks=tasks,
        limit=arguments.limit,
        folder=arguments.run_dir,
        batch_size=arguments.batch_size,
    )
    plan = PruningPlan.load(arguments.plan) if arguments.plan else None
    betas = read_betas(arguments.betas) if arguments.betas else plan and plan.betas
    table = run.scores(plan, betas)
    if not is_first():
        return
    print(table.to_string())
    if len(table) > 1 and table.metric.nunique() == 1:
        print(f"average {100 * table.value.mean():.2f}")


def _recover(arguments) -> None:
    from .checkpoints import load_model, save_model
    from .corpora import calibration_tokens
    from .files import refuse_existing
    from .processes import is_first
    from .pruning import PruningPlan
    from .recovery import gathered, recover, under_fsdp

    refuse_existing(arguments.destination)
    if under_fsdp():  # first: then only one process reads the weights
        from accelerate import PartialState

        PartialState()
    model, tokenizer = load_model(arguments.source, dtype=arguments.dtype)
    teacher = load_model(arguments.teacher, dtype=arguments.dtype)[0] if arguments.teacher else None
    plan = PruningPlan.load(arguments.plan) if arguments.plan else None
    shape = {"sequences": arguments.sequences, "length": arguments.length, "seed": arguments.seed}
    tokens = calibration_tokens(arguments.corpus, tokenizer, **shape)
    options = {"steps": arguments.steps, "learning_rate": arguments.learning_rate, "batch_size": arguments.batch_size}
    found = recover(model, tokens, arguments.rung, teacher=teacher, plan=plan, seed=arguments.seed, **options)
    state = gathered(model)
    if is_first():
        if state is not None:
            model = load_model(arguments.source, dtype=arguments.dtype)[0]
            lacking, unknown = model.load_state_dict(state, strict=False)
            if unknown or set(lacking) - set(model.all_tied_weights_keys):
                raise RuntimeError(f"What was trained does not fit the model: {[*unknown, *lacking][0]}. Nothing was saved.")
        save_model(model, tokenizer, arguments.destination)
        print(
            f"{arguments.destination}: {found['trained']} parameters trained in {found['seconds']:.0f} s, "
            f"loss {found['losses'][0]:.3f} to {found['losses'][-1]:.3f}"
        )


def _acceptance(arguments) -> None:
    import pandas as pd

    from .acceptance import acceptance
    from .notebooks import parse_settings

    options = {name.lower(): value for name, value in parse_settings(arguments.set).items()}
    table = pd.DataFrame(acceptance(arguments.model, folder=arguments.run_dir, **options))
    print(table.to_string(index=False))


def _dtype(name: str):
    from .checkpoints import read_dtype

    return _argument(read_dtype, name)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


def _argument(read, text: str):
    """What `read` makes of a word, with its own sentence where that is nothing: argparse does not pass on ValueErrors'."""
    try:
        return read(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _recipe(arguments) -> dict:
    """What was said of the models that a study trains."""
    said = {"preset": arguments.preset, "steps": arguments.steps, "sequences": arguments.sequences}
    said["text"] = arguments.text and tuple(arguments.text)
    return {name: value for name, value in said.items() if value is not None}


def _bench(arguments) -> None:
    if arguments.name not in STUDIES and _recipe(arguments):
        raise ValueError(f"Only studies train models: {', '.join(STUDIES)}; {arguments.name} takes no recipe.")
    if arguments.name == "many":  # each imports what it needs alone: a GPU machine may lack the rest
        from .many import bench_many as call
    elif arguments.name in ("search", "stream"):
        from . import benchmark

        call = getattr(benchmark, f"bench_{arguments.name}")
    elif arguments.name in STUDIES:
        from .recipes import Recipe
        from .seeds import bench_study

        call = partial(bench_study, arguments.name, recipe=Recipe(**_recipe(arguments)))
    else:
        from .speed import bench

        call = partial(bench, arguments.name)
    print(call(arguments.out))


def _add_calibration(command: argparse.ArgumentParser) -> None:
    """What commands that calibrate from disk ask for alike."""
    corpora = "c4, math, gsm8k, web, arithmetic, a file or folder, or a mix of them such as 'code.jsonl*3+c4' (c4)"
    command.add_argument("--calibration", default="c4", metavar="CORPUS", help=corpora)
    command.add_argument("--sequences", type=_count, default=128, metavar="N", help="sequences of the calibration set (128)")
    command.add_argument("--length", type=_count, default=2048, metavar="L", help="tokens of each (2048)")
    command.add_argument("--seed", type=int, default=42, metavar="S", help="which documents are drawn (42)")
    command.add_argument("--dtype", type=_dtype, help="what to compute in (what most weights are of)")
    command.add_argument("--device", help="where to compute (cpu), such as cuda")
    command.add_argument("--batch-size", type=_count, default=8, metavar="B", help="sequences a forward pass (8)")
    command.add_argument("--revision", help="of the hub id")


STUDIES = ("domain_specific", "recovery", "weight_pruning", "quantised")  # over training seeds
BENCHES = ("small", "medium", "full", "search", "stream", "many", *STUDIES)


def _parser() -> argparse.ArgumentParser:
    from pathlib import Path

    parser = argparse.ArgumentParser(prog="python -m esparse", description="Expert-level sparsity in MoE language models.")
    commands = parser.add_subparsers(required=True)
    notebooks = commands.add_parser("notebooks", help="run the notebooks top to bottom, with a summary at the end")
    notebooks.add_argument("names", nargs="*", metavar="01-06", help="numbers, ranges or names; all without")
    notebooks.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a parameter, as MODEL=...")
    notebooks.add_argument("--run-dir", metavar="DIR", help="where copies, traces, results and figures go")
    notebooks.add_argument("--update", action="store_true", help="write what shows something new into notebooks/ and figures/")
    notebooks.set_defaults(call=_notebooks)
    figures = commands.add_parser("figures", help="redraw figures from their saved numbers, without a model")
    figures.add_argument("names", nargs="*", metavar="NAME", help="such as 03_loss_landscape; all without")
    figures.add_argument("--from", dest="source", type=Path, metavar="DIR", help="the folder of the figures (figures/)")
    figures.set_defaults(call=_figures)
    data = commands.add_parser("data", help="make corpora, tasks and the tiny model again, from nothing")
    data.add_argument("--folder", type=Path, help="where to (data/)")
    data.add_argument("--keep-model", action="store_true", help="corpora and tasks only")
    data.set_defaults(call=_data)
    prune = commands.add_parser("prune", help="prune a checkpoint from disk to disk, one layer in memory at a time")
    prune.add_argument("source", help="a local folder of safetensors, or a hub id")
    prune.add_argument("destination", help="the folder to write; absent until it is complete")
    prune.add_argument("--experts", type=_count, metavar="R", help="experts to keep in each layer")
    prune.add_argument("--plan", metavar="FILE", help="which to keep, as the explorer or another run wrote it")
    prune.add_argument("--method", default="enumerate", help="enumerate, greedy, progressive, reap, ... (enumerate)")
    _add_calibration(prune)
    prune.add_argument("--chunk-tokens", type=_count, metavar="T", help="tokens whose expert outputs are held (as fit)")
    prune.add_argument("--dry-run", action="store_true", help="only say what it would take")
    prune.set_defaults(call=_prune)
    weights = commands.add_parser("weights", help="prune weights instead of experts, from disk to disk")
    weights.add_argument("source", help="a local folder of safetensors, or a hub id")
    weights.add_argument("destination", help="the folder to write; absent until it is complete")
    weights.add_argument("--sparsity", required=True, metavar="S", help="a share such as 0.5, or N:M such as 2:4")
    weights.add_argument("--method", default="moe-pruner", help="magnitude, wanda or moe-pruner (moe-pruner)")
    weights.add_argument("--scope", default="experts", help="experts, or linear: every linear map of the layers (experts)")
    weights.add_argument("--dense", action="store_true", help="score on what the dense layers give out")
    _add_calibration(weights)
    weights.set_defaults(call=_weights)
    evaluate = commands.add_parser("evaluate", help="score a model through lm-eval, pruned to a plan and skipping if asked")
    evaluate.add_argument("model", help="tiny, a local folder or a hub id")
    evaluate.add_argument("--tasks", nargs="+", metavar="TASK", help="tiny, paper, domain, perplexity, or lm-eval's names")
    evaluate.add_argument("--plan", metavar="FILE", help="a pruning plan, as prune and search_experts save it")
    evaluate.add_argument(
        "--betas", metavar="FILE", help="JSON with one beta per MoE layer, or such a list under 'betas' (the plan's)"
    )
    evaluate.add_argument("--limit", type=_count, metavar="N", help="items of each task (all; 100 for the tiny model)")
    evaluate.add_argument("--dtype", help="of the weights, such as bfloat16 or int8 (the checkpoint's)")
    evaluate.add_argument("--batch-size", type=_count, metavar="B", help="items at once (64 for the tiny model, 8 for others)")
    evaluate.add_argument("--device-map", metavar="MAP", help="such as auto")
    evaluate.add_argument("--revision", help="of the hub id")
    evaluate.add_argument("--run-dir", metavar="DIR", help="where scores are kept, so that nothing is computed twice")
    evaluate.set_defaults(call=_evaluate)
    recover = commands.add_parser("recover", help="train a pruned model; by default in the paper's setting (Table 4)")
    recover.add_argument("source", help="a pruned folder")
    recover.add_argument("destination", help="the folder to write")
    recover.add_argument("--rung", default="tune", help="router, experts or tune (tune)")
    recover.add_argument("--teacher", metavar="MODEL", help="the full model, for router and experts")
    recover.add_argument("--plan", metavar="FILE", help="the pruning plan, where the teacher has more experts")
    recover.add_argument("--corpus", default="metamath", help="metamath, or what prune --calibration takes (metamath)")
    recover.add_argument("--sequences", type=_count, default=8192, metavar="N", help="sequences to train on (8192)")
    recover.add_argument("--length", type=_count, default=2048, metavar="L", help="tokens of each (2048)")
    recover.add_argument("--steps", type=_count, default=900, metavar="N", help="of the optimiser (900)")
    recover.add_argument("--learning-rate", type=float, default=2e-5, metavar="R", help="at its highest (2e-5)")
    recover.add_argument("--batch-size", type=_count, default=8, metavar="B", help="sequences a process and step (8)")
    recover.add_argument("--dtype", type=_dtype, help="of the weights while training (the checkpoint's)")
    recover.add_argument("--seed", type=int, default=42, metavar="S", help="of the order of the data (42)")
    recover.set_defaults(call=_recover)
    acceptance = commands.add_parser("acceptance", help="set a real Mixtral 8x7B beside what the paper prints for it")
    acceptance.add_argument("model", help="a local folder, or mistralai/Mixtral-8x7B-v0.1")
    acceptance.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="such as DOMAIN=... or SEQUENCES=8"
    )
    acceptance.add_argument("--run-dir", metavar="DIR", help="where traces and plans go")
    acceptance.set_defaults(call=_acceptance)
    bench = commands.add_parser("bench", help="measure search, memory and speed on this machine")
    bench.add_argument("name", choices=BENCHES, help="what to measure, or to study over training seeds")
    bench.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    bench.add_argument("--preset", help="of the models that a study trains: tiny, small-16 with 51 M parameters (tiny)")
    bench.add_argument("--steps", type=_count, metavar="N", help="of their training (3600)")
    bench.add_argument("--sequences", type=_count, metavar="N", help="of 256 tokens a step (8)")
    bench.add_argument("--text", nargs=2, metavar="FILE", help="two files to train on as well, general and domain")
    bench.set_defaults(call=_bench)
    return parser


def main(words: list[str] | None = None) -> int:
    """Run one command; a user's mistake ends in one sentence on standard error and exit status 2."""
    from .processes import leave_ranks

    arguments = _parser().parse_args(words)
    try:
        arguments.call(arguments)
        leave_ranks()  # not after a mistake, when others may wait in vain for this one
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"esparse: {(str(error).strip() or type(error).__name__).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
