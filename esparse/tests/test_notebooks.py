"""All notebooks run, from the command line, and what is committed is fit to be read."""

import json
import re
import shutil

import nbformat
import pytest

from esparse import notebooks
from esparse.files import checkout
from esparse.tests.conftest import command

PATHS = notebooks.find()
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


def test_an_interrupted_run_goes_on(finished, tmp_path):
    """With the traces, plans and results of a run but no finished notebook, nothing is computed twice."""
    for part in ("traces", "plans", "results"):
        shutil.copytree(finished[0] / part, tmp_path / part)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    result = command("notebooks", "02", "--set", "LIMIT=30", "--run-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr
    for part in ("traces", "plans", "results"):
        files = [path for path in (tmp_path / part).rglob("*") if path.is_file()]
        assert {path: path.stat().st_mtime_ns for path in files} == {p: t for p, t in before.items() if p in files}


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
    import esparse

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
    assert notebook.cells[0].source.startswith(f"# {path.stem[:2]} ") and "**Cost**" in notebook.cells[0].source
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "assert" in code[-1].source
    assert sum(bool(cell.outputs) for cell in code) >= len(code) - 5
    assert "widgets" not in notebook.metadata and "widget-view" not in raw and "it/s" not in raw
    assert not re.search(r"(/root|/home|/tmp|/work|/Users)/", raw)
    assert len(raw) < 1_500_000
    for cell in code:
        assert len([line for line in cell.source.splitlines() if line.strip()]) <= 25
        assert cell.execution_count is None and "execution" not in cell.metadata
    images = [o for cell in code for o in cell.outputs if "image/png" in o.get("data", {})]
    assert images, "a reader on GitHub sees no figure"


def test_readme_commands_are_single_lines_and_ci_calls_one():
    readme = (checkout() / "README.md").read_text()
    commands = [line for line in readme.splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert commands[0].endswith("-m esparse notebooks") and "pytest" in commands[1]
    assert all("pip install -q -r requirements.txt" in line for line in commands)
    assert commands[1] in readme and "README.md" in (checkout() / ".ci" / "run").read_text()


def test_the_public_address_stands_in_one_place():
    import tomllib

    project = tomllib.loads((checkout() / "pyproject.toml").read_text())["project"]
    address = project["urls"]["Repository"]
    readme = (checkout() / "README.md").read_text()
    assert set(re.findall(r"https://github\.com/[\w-]+/esparse", readme)) <= {address}
    assert json.dumps(address)
