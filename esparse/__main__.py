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
    from .streaming import join_ranks, prune_checkpoint, rank

    join_ranks()
    options = {"sequences": arguments.sequences, "length": arguments.length, "method": arguments.method}
    options |= {"revision": arguments.revision, "dtype": arguments.dtype, "batch_size": arguments.batch_size}
    if rank() == 0:
        needs = preflight(arguments.source, arguments.experts, destination=arguments.destination, **options)
        print("\n".join(f"{name + ':':10}{value}" for name, value in needs.items()), flush=True)
    if arguments.dry_run:
        return
    options |= {"device": arguments.device, "chunk_tokens": arguments.chunk_tokens, "seed": arguments.seed}
    report = prune_checkpoint(
        arguments.source, arguments.destination, arguments.experts, calibration=arguments.calibration, **options
    )
    if rank() == 0:
        print(f"{arguments.destination}: {report['n']} to {report['r']} experts in {report['seconds']:.0f} s")
        print(
            f"at most {report['peak_gb']:.1f} GB of memory" + (f"; left out: {report['left_out']}" * bool(report["left_out"]))
        )


def _acceptance(arguments) -> None:
    import pandas as pd

    from .acceptance import acceptance
    from .notebooks import parse_settings

    options = {name.lower(): value for name, value in parse_settings(arguments.set).items()}
    table = pd.DataFrame(acceptance(arguments.model, folder=arguments.run_dir, **options))
    print(table.to_string(index=False))


def _dtype(name: str):
    import torch

    if name not in ("bfloat16", "float16", "float32"):
        raise argparse.ArgumentTypeError(f"{name!r} is none of bfloat16, float16, float32")
    return getattr(torch, name)


def _bench(arguments) -> None:
    if arguments.name == "many":  # each imports what it needs alone: a GPU machine may lack the rest
        from .many import bench_many as call
    elif arguments.name in ("search", "stream"):
        from . import benchmark

        call = getattr(benchmark, f"bench_{arguments.name}")
    else:
        from .speed import bench

        call = partial(bench, arguments.name)
    print(call(arguments.out))


def _parser() -> argparse.ArgumentParser:
    from pathlib import Path

    parser = argparse.ArgumentParser(prog="python -m esparse", description="Expert-level sparsity in MoE language models.")
    commands = parser.add_subparsers(required=True)
    notebooks = commands.add_parser("notebooks", help="run the notebooks top to bottom, with a summary at the end")
    notebooks.add_argument("names", nargs="*", metavar="01-06", help="numbers, ranges or names; all without")
    notebooks.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a parameter, as MODEL=...")
    notebooks.add_argument("--run-dir", metavar="DIR", help="where copies, traces, results and figures go")
    notebooks.add_argument("--update", action="store_true", help="write the outputs back into notebooks/")
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
    prune.add_argument("--experts", type=int, required=True, metavar="R", help="experts to keep in each layer")
    prune.add_argument("--calibration", default="c4", metavar="CORPUS", help="c4, math, gsm8k, web, arithmetic or a path (c4)")
    prune.add_argument("--sequences", type=int, default=128, metavar="N", help="sequences of the calibration set (128)")
    prune.add_argument("--length", type=int, default=2048, metavar="L", help="tokens of each (2048)")
    prune.add_argument("--seed", type=int, default=42, metavar="S", help="which documents are drawn (42)")
    prune.add_argument("--method", default="enumerate", help="enumerate, greedy, progressive, reap, ... (enumerate)")
    prune.add_argument("--dtype", type=_dtype, help="what to compute in (what most weights are of)")
    prune.add_argument("--device", help="where to compute (cpu), such as cuda")
    prune.add_argument("--batch-size", type=int, default=8, metavar="B", help="sequences a forward pass (8)")
    prune.add_argument("--chunk-tokens", type=int, metavar="T", help="tokens whose expert outputs are held (as fit)")
    prune.add_argument("--revision", help="of the hub id")
    prune.add_argument("--dry-run", action="store_true", help="only say what it would take")
    prune.set_defaults(call=_prune)
    acceptance = commands.add_parser("acceptance", help="set a real Mixtral 8x7B beside what the paper prints for it")
    acceptance.add_argument("model", help="a local folder, or mistralai/Mixtral-8x7B-v0.1")
    acceptance.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="such as DOMAIN=... or SEQUENCES=8"
    )
    acceptance.add_argument("--run-dir", metavar="DIR", help="where traces and plans go")
    acceptance.set_defaults(call=_acceptance)
    bench = commands.add_parser("bench", help="measure search, memory and speed on this machine")
    bench.add_argument("name", choices=["small", "medium", "full", "search", "stream", "many"], help="what to measure")
    bench.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    bench.set_defaults(call=_bench)
    return parser


def main(words: list[str] | None = None) -> int:
    """Run one command; a user's mistake ends in one sentence on standard error and exit status 2."""
    arguments = _parser().parse_args(words)
    try:
        arguments.call(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"esparse: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
