"""The command line: `python -m esparse notebooks | figures | data | bench`. Each command is one function of the package."""

import argparse
import sys
import time


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


def _bench(arguments) -> None:
    from .benchmark import BENCHMARKS

    print(BENCHMARKS[arguments.name](arguments.out))


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
    bench = commands.add_parser("bench", help="measure search, memory and speed on this machine")
    bench.add_argument("name", choices=["search", "generation", "full"], help="what to measure")
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
