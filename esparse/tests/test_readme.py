"""The front door: every link, path, command and figure that the README names is there, and says what the code says."""

import json
import re
import shlex
import tomllib

import nbformat
import pytest

import esparse
from esparse import __main__, gallery, notebooks
from esparse.files import checkout, data_folder

README = (checkout() / "README.md").read_text()
LINKS = re.findall(r"\]\(([^)\s]+)\)", README)
FENCE = re.compile(r"^```\w*\n(.*?)^```", flags=re.M | re.S)


def test_every_link_leads_somewhere():
    assert len(LINKS) > 20
    for link in LINKS:
        if link.startswith("https://"):
            assert re.fullmatch(r"https://[a-z0-9.-]+\.[a-z]+/[\w./-]+", link), link
        else:
            assert (checkout() / link).exists(), link


def test_every_path_in_words_is_there():
    """Anything that looks like a place in the checkout: folders with a slash at their end, files with one inside."""
    places = re.findall(r"`((?:data|esparse|figures|notebooks|\.ci)/[\w./-]*)`", README)
    measured = [word for word in re.findall(r"data/results/\w+\.json", README) if "speed_full" not in word]  # not yet measured
    assert len(places) > 5 and len(measured) >= 5
    for place in [*places, *measured, ".pre-commit-config.yaml", ".ci/run", ".ci/drift"]:
        assert (checkout() / place).exists(), place


def commands() -> list[str]:
    lines = [line for fence in FENCE.findall(README) for line in fence.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", FENCE.sub("", README))
    return [line.partition("-m esparse ")[2] for line in lines if "-m esparse " in line]


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_every_command_is_one(command):
    arguments = __main__._parser().parse_args(shlex.split(command))
    if arguments.call is __main__._notebooks:
        settings = notebooks.parse_settings(arguments.set)
        for path in notebooks.find(arguments.names):
            assert settings.keys() <= notebooks.parameters(nbformat.read(path, as_version=4)).keys()


@pytest.mark.slow
def test_the_example_in_python_runs(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"^```python\n(.*?)^```", README, flags=re.M | re.S)
    evaluate = esparse.evaluate
    monkeypatch.setattr(esparse, "evaluate", lambda *arguments: evaluate(*arguments, limit=4))  # the rest as it stands
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert "arithmetic_problems" in capsys.readouterr().out
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["num_local_experts"] == 6


def test_commands_are_single_lines_and_ci_calls_one():
    found = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(found) == 2
    assert found[0].endswith("-m esparse notebooks") and found[1].endswith("-m pytest")
    assert all("pip install -q -r requirements.txt" in line for line in found)
    assert "README.md" in (checkout() / ".ci" / "run").read_text()


def test_tables_hold_every_notebook_figure_and_task():
    for path in notebooks.find():
        assert re.search(rf"^\| \[{path.stem}\]\(notebooks/{path.name}\) \| .+ \| [1-9]\d* \| [1-9]\d+ \|$", README, flags=re.M)
    for name, (paper, _) in gallery.ABOUT.items():
        assert f"| `{name}` | {name[:2]} | {paper} |" in README, name
    for path in (data_folder() / "tasks").glob("*.yaml"):
        assert f"| `{path.stem}` |" in README


def test_the_public_address_stands_in_one_place():
    address = notebooks.address()
    assert tomllib.loads((checkout() / "pyproject.toml").read_text())["project"]["urls"]["Repository"] == address
    owner = address.removeprefix("https://github.com/")
    for path in [checkout() / "README.md", *notebooks.find()]:
        found = re.findall(r"(?:github\.com|colab\.research\.google\.com/github)/([\w.-]+/esparse)\b", path.read_text())
        assert set(found) <= {owner}
    for path in notebooks.find():
        assert path.read_text().count(owner) == 2  # its badge, and the setup cell


def test_numbers_of_the_results_are_those_measured():
    """What the README says of the benchmark's medium size is what its file says."""
    result = json.loads((data_folder() / "results" / "speed_medium.json").read_text())
    gains = {row["r"]: row["decoding"]["1"]["gain"] for row in result["rows"]}
    told = re.search(r"decoding is ([\d.]+) times as fast at r = 8 .*? ([\d.]+) at r = 6, ([\d.]+) at r = 4", README)
    assert [float(word) for word in told.groups()] == [pytest.approx(gains[r], abs=0.006) for r in (8, 6, 4)]
