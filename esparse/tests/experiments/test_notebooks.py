"""All notebooks run from the command line, and the committed notebooks are fit to be read.

Each runs once with a kernel, as a user runs it. With other parameters its cells run in this process.
"""

import copy
import json
import re
import shutil
import sys
import types
import warnings
from contextlib import asynccontextmanager, chdir
from numbers import Number

import nbformat
import pandas as pd
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from traitlets.config import Config

import esparse
from esparse.experiments import figures, notebooks
from esparse.files import checkout
from esparse.tests.conftest import FEW, command, random_model

PATHS = notebooks.find()
FIGURES = checkout() / "figures"
NAMES = [
    "MODEL",
    "REVISION",
    "DTYPE",
    "DEVICE_MAP",
    "GENERAL",
    "DOMAIN",
    "SEQUENCES",
    "LENGTH",
    "SEED",
    "KEEP",
    "METHOD",
    "TASKS",
    "LIMIT",
    "RUN_DIR",
]


class Here:
    """Runs a notebook's cells in this process, which has imported all that they need, in the place of a kernel."""

    def __init__(self, notebook, **_options):
        self.resources = {}

    @asynccontextmanager
    async def async_setup_kernel(self, env):
        InteractiveShell.clear_instance()
        module = types.ModuleType("cells_of_a_notebook")
        quiet = Config(HistoryManager={"enabled": False})
        self.shell = InteractiveShell.instance(config=quiet, user_module=module)
        with chdir(self.resources["metadata"]["path"]), warnings.catch_warnings(), pd.option_context("display.precision", 6):
            warnings.simplefilter("default")  # a kernel shows them
            yield
        pd.reset_option("display.max_colwidth")
        InteractiveShell.clear_instance()
        sys.modules.pop(module.__name__, None)

    async def async_execute_cell(self, cell, index):
        with capture_output() as shown:
            done = self.shell.run_cell(cell.source)
        done.raise_error()
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=shown.stdout)]


@pytest.fixture
def call_here(call, monkeypatch):
    """A command in this process, and the cells of the notebooks that it runs."""
    monkeypatch.setattr(notebooks, "NotebookClient", Here)
    return call


@pytest.mark.slow
def test_all_notebooks_run_and_are_summed_up(finished):
    folder, printed = finished
    assert [path.stem for path in PATHS] == [
        "00_quickstart",
        "01_expert_selection",
        "02_c4_vs_math",
        "03_expert_pruning",
        "04_beta_calibration",
        "05_dynamic_skipping",
        "06_memory_and_speed",
        "07_domain_specific",
        "08_recovery",
        "09_weight_pruning",
        "10_many_experts",
        "11_explorer",
    ]
    for path in PATHS:
        assert re.search(rf"{path.stem} +[0-9.]+ +[1-9][0-9]+ +[1-9]", printed), printed
        ran = nbformat.read(folder / "notebooks" / path.name, as_version=4)
        assert not [o for cell in ran.cells for o in cell.get("outputs", []) if o.output_type == "error"]
        assert list((folder / "figures").glob(f"{path.stem[:2]}_*.pdf"))
    assert f"{len(PATHS)} notebooks" in printed


@pytest.mark.alone
@pytest.mark.slow
def test_finished_notebooks_are_not_run_again_and_changed_settings_are(finished, call_here, tmp_path):
    folder, _ = finished
    again = call_here("notebooks", *FEW, "--run-dir", folder)
    assert f"0 s ({len(PATHS)} reused)" in again.stdout
    parts = ("notebooks", "figures")
    for part in parts:
        shutil.copytree(folder / part, tmp_path / part)
    other = call_here("notebooks", "01", "--set", "SEED=43", "--run-dir", folder)
    assert other.returncode == 0 and "reused" not in other.stdout
    for part in parts:  # other tests read what the first run left
        shutil.copytree(tmp_path / part, folder / part, dirs_exist_ok=True)


@pytest.mark.slow
def test_running_twice_gives_the_same_numbers(finished, call_here, tmp_path):
    """02 again in a fresh folder: the same experts. Threaded products may round their last bit otherwise under load and
    send one token of 16,384 to another expert, so shares of tokens are held to a few tokens."""
    result = call_here("notebooks", "02", "--run-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    one, two = (json.loads((folder / "figures" / "02_divergence.json").read_text()) for folder in (tmp_path, finished[0]))
    for key in ("between", "within"):
        assert one[key] == pytest.approx(two[key], abs=5 / 16384)
    kept = [(folder / "figures" / "02_kept_experts.json").read_text() for folder in (tmp_path, finished[0])]
    assert kept[0] == kept[1]


# Figures that hold scores of tasks, of which the tests ask fewer items than what is committed.
SCORED = ("03_methods", "05_scores")


def assert_alike(one, other, where: str) -> None:
    """The same structure and words, and numbers that differ by no more than a few tokens of 16,384 routed otherwise."""
    assert type(one) is type(other) or (isinstance(one, Number) and isinstance(other, Number)), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_alike(one[key], other[key], f"{where}, {key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_alike(*pair, f"{where}, {i}")
    elif isinstance(one, Number):
        assert one == pytest.approx(other, rel=5e-3, abs=1e-3), where
    else:
        assert one == other, where


@pytest.mark.slow
def test_what_is_committed_is_what_the_code_computes(finished):
    """Every figure's numbers, and how many outputs each cell has."""
    for name in figures.figures():
        if name not in SCORED:
            here, there = (json.loads((folder / f"{name}.json").read_text()) for folder in (finished[0] / "figures", FIGURES))
            assert_alike(here, there, name)
    for path in PATHS:
        committed, ran = (nbformat.read(p, as_version=4) for p in (path, finished[0] / "notebooks" / path.name))
        cells = [cell for cell in ran.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
        assert [cell.source for cell in cells] == [cell.source for cell in committed.cells]
        assert [len(cell.get("outputs", [])) for cell in cells] == [len(cell.get("outputs", [])) for cell in committed.cells]


@pytest.mark.alone
@pytest.mark.slow
def test_an_interrupted_run_goes_on(finished, call, tmp_path):
    """With the traces, plans and results of a run but no finished notebook, nothing is computed twice, the numbers are the
    same, and a notebook that took long takes a fraction of it."""
    for part in ("traces", "plans", "results", "explorer"):
        shutil.copytree(finished[0] / part, tmp_path / part)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    result = call("notebooks", "03", *FEW, "--run-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    for part in ("traces", "plans", "results", "explorer"):
        files = [path for path in (tmp_path / part).rglob("*") if path.is_file()]
        assert {path: path.stat().st_mtime_ns for path in files} == {p: t for p, t in before.items() if p in files}
    first, second = (
        json.loads((folder / "notebooks" / f"{PATHS[3].stem}.json").read_text()) for folder in (finished[0], tmp_path)
    )
    assert first["seconds"] > 2 * second["seconds"]  # with few items: at the default limit it is more
    for path in (tmp_path / "figures").glob("*.json"):
        assert_alike(json.loads(path.read_text()), json.loads((finished[0] / "figures" / path.name).read_text()), path.stem)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["notebooks", "42"], "No notebook matches '42'"),
        (["notebooks", "01", "--set", "MODLE=tiny"], "no parameter 'MODLE'"),
        (["notebooks", "01", "02", "--set", "LIMIT=3"], "no parameter 'LIMIT'"),
        (["notebooks", "01", "--set", "tiny"], "A setting is written NAME=VALUE"),
        (["figures", "nothing"], "There is no figure"),
        (["data"], "already exists"),
        (["bench", "full"], "needs one GPU"),
    ],
)
def test_mistakes_on_the_command_line_end_in_one_sentence(words, sentence, call):
    result = call(*words)
    assert result.returncode == 2 and sentence in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_process_ends_with_the_status_of_its_command():
    result = command("bench", "search", "--preset", "tiny")
    assert result.returncode == 2 and result.stderr.startswith("esparse: Only studies train models")


def test_a_notebook_gets_the_settings_that_it_declares(tmp_path):
    changed = notebooks._with_settings(nbformat.read(PATHS[1], as_version=4), {"LIMIT": 3, "SEED": 7, "KEEP": [6]})
    (cell,) = [cell for cell in changed.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    assert changed.cells.index(cell) == 3 and cell.source == "SEED = 7\nKEEP = [6]"
    with pytest.raises(ValueError, match="The selected notebooks have no parameter 'LIMIT': there are MODEL, "):
        notebooks.run_notebooks(["01"], settings={"LIMIT": 3})
    names = {"MODEL": "tiny", "KEEP": 6, "RUN_DIR": tmp_path, "esparse": esparse, "run": None}
    assert esparse.Run.from_parameters(names) == esparse.Run(keep=6, folder=tmp_path)


@pytest.mark.slow
def test_a_failing_notebook_is_named_with_its_cell(call, tmp_path):
    result = call("notebooks", "01", "--set", "MODEL='/nowhere'", "--run-dir", tmp_path)
    assert result.returncode == 2
    assert "01_expert_selection.ipynb failed in cell" in result.stderr and "no model folder at /nowhere" in result.stderr
    assert not (tmp_path / "notebooks").exists()


@pytest.mark.slow
def test_another_model_runs_by_changing_model_alone(tmp_path, tiny, call_here):
    """A folder with another Mixtral: 16 experts, random weights, its own corpora given as paths."""
    esparse.save_model(esparse.load_model("tiny-16")[0], tiny[1], tmp_path / "model")
    words = [
        f"MODEL={str(tmp_path / 'model')!r}",
        "GENERAL='web'",
        "DOMAIN='arithmetic'",
        "SEQUENCES=4",
        "LENGTH=64",
        "KEEP=[14, 15]",
    ]
    options = [part for word in words for part in ("--set", word)]
    result = call_here("notebooks", "01", "02", "04", *options, "--run-dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert "04_beta_calibration" in result.stdout


@pytest.mark.slow
def test_more_than_two_experts_a_token_run_by_changing_model_alone(tmp_path, tiny, call_here):
    """The notebooks whose figures speak of a second expert, on a router that chooses three and does not renormalise."""
    model = random_model("olmoe", 6, 3, dtype=torch.float32, vocab_size=len(tiny[1]))
    esparse.save_model(model, tiny[1], tmp_path / "model")
    words = [f"MODEL={str(tmp_path / 'model')!r}", "GENERAL='web'", "DOMAIN='arithmetic'", "TASKS=['web_facts']", "LIMIT=2"]
    words += ["SEQUENCES=4", "LENGTH=64", "KEEP=[4, 5]"]
    options = [part for word in words for part in ("--set", word)]
    result = call_here("notebooks", "00", "05", "11", *options, "--run-dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert "11_explorer" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("n", "keep"), [(2, None), (3, 2), (3, [3])])
def test_few_experts_and_one_size_run_by_changing_parameters_alone(n, keep, tmp_path, tiny, call_here):
    """Of two experts a token both stay, so nothing can go; of three one can; asked to keep all, nothing does."""
    model = random_model("mixtral", n, 2, dtype=torch.float32, vocab_size=len(tiny[1]))
    esparse.save_model(model, tiny[1], tmp_path / "model")
    words = [f"MODEL={str(tmp_path / 'model')!r}", "GENERAL='web'", "DOMAIN='arithmetic'", "TASKS='web_facts'", "LIMIT=2"]
    words += ["SEQUENCES=4", "LENGTH=64", f"KEEP={keep}"]
    options = [part for word in words for part in ("--set", word)]
    result = call_here("notebooks", "00", "02", "03", "05", "11", *options, "--run-dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    cells = nbformat.read(tmp_path / "run" / "notebooks" / "11_explorer.ipynb", as_version=4).cells
    text = "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))
    assert ("there is no plan to export" in text) == (keep != 2)


@pytest.mark.slow
def test_the_tiny_model_takes_other_corpora_whose_numbers_nobody_vouches_for(tmp_path, call_here):
    """Two halves of one text route alike, which the notebook's numbers for the embedded corpora rule out."""
    for name, part in (("one", range(0, 1500, 2)), ("other", range(1, 1500, 2))):
        text = [f"Item {i} of the list is number {i * 7 % 100} and costs {i % 30} coins. " * 3 for i in part]
        (tmp_path / f"{name}.txt").write_text("\n\n".join(text))
    options = [f"--set=GENERAL={str(tmp_path / 'one.txt')!r}", f"--set=DOMAIN={str(tmp_path / 'other.txt')!r}"]
    small = ["--set=SEQUENCES=8", "--set=LENGTH=64", "--run-dir", tmp_path / "run"]
    result = call_here("notebooks", "01", *options, *small)
    assert result.returncode == 0, result.stderr
    labels = json.loads((tmp_path / "run" / "figures" / "01_frequency.json").read_text())["corpora"]
    assert list(labels) == ["one.txt", "other.txt"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_notebook_is_an_essay(path):
    """Title and finding, setup, parameters, the main figure; then how to read it, the method with its equation beside the
    lines of code, and behind what is optional the details and the checks."""
    cells = nbformat.read(path, as_version=4).cells
    tags = [cell.metadata.get("tags", []) for cell in cells[:4]]
    assert [cell.cell_type for cell in cells[:4]] == ["markdown", "code", "code", "code"]
    assert tags == [[], ["setup"], ["parameters"], []]
    assert "esparse.Run.from_parameters(globals())" in cells[3].source and "run.figure(" in cells[3].source
    assert any("image/png" in output.get("data", {}) for output in cells[3].outputs)
    headings = [line for cell in cells if cell.cell_type == "markdown" for line in re.findall("^## .*", cell.source, re.M)]
    method = next(name for name in headings if name.startswith("## The method"))
    order = ["## How to read it", method, "## Sliders", "## Details", "## Checks"]
    assert [name for name in headings if name in order] == [name for name in order if name in headings]
    assert headings[:2] == order[:2] and headings[-2:] == order[-2:]
    assert any(cell.source.count("$$") >= 2 for cell in cells)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_what_is_committed_is_fit_to_be_read(path):
    raw = path.read_text()
    notebook = nbformat.read(path, as_version=4)
    declared = notebooks.parameters(notebook)
    assert list(declared) == [name for name in NAMES if name in declared] and {"MODEL", "RUN_DIR"} <= declared.keys()
    assert declared["MODEL"] == "tiny"
    title, finding, cost, badge = notebook.cells[0].source.split("\n\n")
    assert title.startswith(f"# {path.stem[:2]} ") and cost.startswith("**Cost**") and path.name in badge
    assert len(re.findall(r"[.?](?= |$)", finding)) <= 3 and "$$" not in finding
    assert re.search(r"\b(seconds|minutes)\b", cost.split(", ")[0])  # how long it takes comes first
    assert notebook.cells == notebooks.addressed(copy.deepcopy(notebook), path.name).cells
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "assert" in code[-1].source
    assert sum(bool(cell.outputs) for cell in code) >= len(code) - 5
    assert "widgets" not in notebook.metadata and "widget-view" not in raw and "it/s" not in raw
    assert not re.search(r"(/root|/home|/tmp|/work|/Users)/", raw)
    assert len(raw) < 1_000_000
    for cell in code:
        assert len([line for line in cell.source.splitlines() if line.strip()]) <= 25
        assert cell.execution_count is None and "execution" not in cell.metadata
    images = [o for cell in code for o in cell.outputs if "image/png" in o.get("data", {})]
    assert images, "a reader on GitHub sees no figure"
    told = [entry["shows"] for entry in figures.manifest().values()]
    for image in images:  # in words as well, for who cannot see it
        assert image.metadata["image/png"]["alt"] == image.data["text/plain"] and image.data["text/plain"] in told
    below = [o.data["text/markdown"] for cell in code for o in cell.outputs if "text/markdown" in o.get("data", {})]
    assert below == [f"*{image.data['text/plain']}*" for image in images]  # where JupyterLab's readers find it
    assert not any(mark in words for words in told for mark in "*_`")
    drawn = re.findall(r"run\.figure\(\"(\w+)\"", "\n".join(cell.source for cell in code))
    assert len(drawn) == len(images) and set(drawn) <= set(figures.figures())
