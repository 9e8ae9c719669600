"""All notebooks run, from the command line, and what is committed is fit to be read."""

import copy
import json
import re
import shutil
from numbers import Number

import nbformat
import pytest
import torch

import esparse
from esparse import gallery, notebooks
from esparse.files import checkout
from esparse.tests.conftest import command, random_model

pytestmark = pytest.mark.slow

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


def test_finished_notebooks_are_not_run_again_and_changed_settings_are(finished):
    folder, _ = finished
    again = command("notebooks", "--set", "LIMIT=30", "--run-dir", str(folder))
    assert f"0 s ({len(PATHS)} reused)" in again.stdout
    other = command("notebooks", "01", "--set", "LIMIT=31", "--run-dir", str(folder))
    assert other.returncode == 0 and "reused" not in other.stdout


def test_running_twice_gives_the_same_numbers(finished, tmp_path):
    """02 again in a fresh folder: the same experts. Threaded products may round their last bit otherwise under load and
    send one token of 16,384 to another expert, so shares of tokens are held to a few tokens."""
    result = command("notebooks", "02", "--set", "LIMIT=30", "--run-dir", str(tmp_path))
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


def test_what_is_committed_is_what_the_code_computes(finished):
    """Every figure's numbers, and how many outputs each cell has."""
    for name in gallery.ABOUT:
        if name not in SCORED:
            here, there = (json.loads((folder / f"{name}.json").read_text()) for folder in (finished[0] / "figures", FIGURES))
            assert_alike(here, there, name)
    for path in PATHS:
        committed, ran = (nbformat.read(p, as_version=4) for p in (path, finished[0] / "notebooks" / path.name))
        cells = [cell for cell in ran.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
        assert [cell.source for cell in cells] == [cell.source for cell in committed.cells]
        assert [len(cell.get("outputs", [])) for cell in cells] == [len(cell.get("outputs", [])) for cell in committed.cells]


def test_an_interrupted_run_goes_on(finished, tmp_path):
    """With the traces, plans and results of a run but no finished notebook, nothing is computed twice, the numbers are the
    same, and a notebook that took long takes a fraction of it."""
    for part in ("traces", "plans", "results", "explorer"):
        shutil.copytree(finished[0] / part, tmp_path / part)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    result = command("notebooks", "03", "--set", "LIMIT=30", "--run-dir", str(tmp_path))
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


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["notebooks", "42"], "No notebook matches '42'"),
        (["notebooks", "01", "--set", "MODLE=tiny"], "no parameter 'MODLE'"),
        (["notebooks", "01", "--set", "tiny"], "A setting is written NAME=VALUE"),
        (["figures", "nothing"], "There is no figure"),
        (["data"], "already exists"),
        (["bench", "full"], "needs one GPU"),
    ],
)
def test_mistakes_on_the_command_line_end_in_one_sentence(words, sentence):
    result = command(*words)
    assert result.returncode == 2 and sentence in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_failing_notebook_is_named_with_its_cell(tmp_path):
    result = command("notebooks", "01", "--set", "MODEL='/nowhere'", "--run-dir", str(tmp_path))
    assert result.returncode == 2
    assert "01_expert_selection.ipynb failed in cell" in result.stderr and "no model folder at /nowhere" in result.stderr
    assert not (tmp_path / "notebooks").exists()


def test_another_model_runs_by_changing_model_alone(tmp_path, tiny):
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
    result = command("notebooks", "01", "02", "04", *options, "--run-dir", str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    assert "04_beta_calibration" in result.stdout


def test_more_than_two_experts_a_token_run_by_changing_model_alone(tmp_path, tiny):
    """The notebooks whose figures speak of a second expert, on a router that chooses three and does not renormalise."""
    model = random_model("olmoe", 6, 3, dtype=torch.float32, vocab_size=len(tiny[1]))
    esparse.save_model(model, tiny[1], tmp_path / "model")
    words = [f"MODEL={str(tmp_path / 'model')!r}", "GENERAL='web'", "DOMAIN='arithmetic'", "TASKS=['web_facts']", "LIMIT=2"]
    words += ["SEQUENCES=4", "LENGTH=64", "KEEP=[4, 5]"]
    options = [part for word in words for part in ("--set", word)]
    result = command("notebooks", "00", "05", "11", *options, "--run-dir", str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    assert "11_explorer" in result.stdout


@pytest.mark.parametrize(("n", "keep"), [(2, None), (3, 2), (3, [3])])
def test_few_experts_and_one_size_run_by_changing_parameters_alone(n, keep, tmp_path, tiny):
    """Of two experts a token both stay, so nothing can go; of three one can; asked to keep all, nothing does."""
    model = random_model("mixtral", n, 2, dtype=torch.float32, vocab_size=len(tiny[1]))
    esparse.save_model(model, tiny[1], tmp_path / "model")
    words = [f"MODEL={str(tmp_path / 'model')!r}", "GENERAL='web'", "DOMAIN='arithmetic'", "TASKS='web_facts'", "LIMIT=2"]
    words += ["SEQUENCES=4", "LENGTH=64", f"KEEP={keep}"]
    options = [part for word in words for part in ("--set", word)]
    result = command("notebooks", "00", "02", "03", "05", "11", *options, "--run-dir", str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    cells = nbformat.read(tmp_path / "run" / "notebooks" / "11_explorer.ipynb", as_version=4).cells
    text = "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))
    assert ("there is no plan to export" in text) == (keep != 2)


def test_the_tiny_model_takes_other_corpora_whose_numbers_nobody_vouches_for(tmp_path):
    """Two halves of one text route alike, which the notebook's numbers for the embedded corpora rule out."""
    for name, part in (("one", range(0, 1500, 2)), ("other", range(1, 1500, 2))):
        text = [f"Item {i} of the list is number {i * 7 % 100} and costs {i % 30} coins. " * 3 for i in part]
        (tmp_path / f"{name}.txt").write_text("\n\n".join(text))
    options = [f"--set=GENERAL={str(tmp_path / 'one.txt')!r}", f"--set=DOMAIN={str(tmp_path / 'other.txt')!r}"]
    small = ["--set=SEQUENCES=8", "--set=LENGTH=64", "--run-dir", str(tmp_path / "run")]
    result = command("notebooks", "01", *options, *small)
    assert result.returncode == 0, result.stderr
    labels = json.loads((tmp_path / "run" / "figures" / "01_frequency.json").read_text())["corpora"]
    assert list(labels) == ["one.txt", "other.txt"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_what_is_committed_is_fit_to_be_read(path):
    raw = path.read_text()
    notebook = nbformat.read(path, as_version=4)
    assert list(notebooks.parameters(notebook)) == NAMES
    assert notebooks.parameters(notebook)["MODEL"] == "tiny"
    title, first, cost, badge = notebook.cells[0].source.split("\n\n")
    assert title.startswith(f"# {path.stem[:2]} ") and cost.startswith("**Cost**") and path.name in badge
    assert re.search(r"\b(seconds?|minutes?)\b", re.split(r"[.:] ", first)[0])  # the first sentence says how long it takes
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
    told = [entry["shows"] for entry in gallery.manifest().values()]
    for image in images:  # in words as well, for who cannot see it
        assert image.metadata["image/png"]["alt"] == image.data["text/plain"] and image.data["text/plain"] in told
    below = [o.data["text/markdown"] for cell in code for o in cell.outputs if "text/markdown" in o.get("data", {})]
    assert below == [f"*{image.data['text/plain']}*" for image in images]  # where JupyterLab's readers find it
    assert not any(mark in words for words in told for mark in "*_`")
    drawn = re.findall(r"run\.figure\(\"(\w+)\"", "\n".join(cell.source for cell in code))
    assert len(drawn) == len(images) and set(drawn) <= set(gallery.ABOUT)
