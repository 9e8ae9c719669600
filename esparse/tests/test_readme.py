"""The front page and the other pages: every link, path, command and figure exists and agrees with the code."""

import json
import re
import shlex
import tomllib

import nbformat
import pytest

import esparse
from esparse import __main__
from esparse.experiments import figures, notebooks
from esparse.files import checkout, data_folder
from esparse.pruning.search import SEARCH_METHODS
from esparse.tests import with_engines

FRONT = "README.md"
FOLDERS = ("data", "esparse", "figures", "findings", "notebooks")
FILES = [checkout() / FRONT, *(path for folder in FOLDERS for path in sorted((checkout() / folder).rglob("*.md")))]
PAGES = {path.relative_to(checkout()).as_posix(): path.read_text() for path in FILES}
README = PAGES[FRONT]
EVERYTHING = "\n".join(PAGES.values())
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```\w*\n(.*?)^```", flags=re.M | re.S)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def linked(page: str) -> set[str]:
    """The pages that a page links to, by their paths in the checkout."""
    found = {(checkout() / page).parent / link.partition("#")[0] for link in LINK.findall(PAGES[page]) if "://" not in link}
    inside = {path.resolve() for path in found}
    return {other for other in PAGES if (checkout() / other).resolve() in inside}


def test_the_front_page_is_short_and_leads_to_every_page():
    assert len((checkout() / FRONT).read_bytes()) <= 7168
    assert {"data/README.md", "data/results/README.md", "figures/README.md", "esparse/FAMILIES.md"} <= PAGES.keys()
    assert {"esparse/COMMANDS.md", "esparse/COMPARISON.md", "esparse/DEVELOPERS.md", "esparse/SERVING.md"} <= PAGES.keys()
    reached, ahead = set(), {FRONT}
    while ahead:
        reached |= ahead
        ahead = set().union(*map(linked, ahead)) - reached
    assert reached == PAGES.keys()
    assert all(FRONT in linked(page) for page in PAGES if page != FRONT)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    links = LINK.findall(PAGES[page])
    assert len(links) > (20 if page == FRONT else 0)
    for link in links:
        if link.startswith("https://"):
            assert re.fullmatch(r"https://[a-z0-9.-]+\.[a-z]+/[\w./-]+", link), link
            continue
        path, _, anchor = link.partition("#")
        target = (checkout() / page).parent / path if path else checkout() / page
        assert target.exists() and target.resolve().is_relative_to(checkout().resolve()), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_every_path_in_words_is_there():
    """Anything that looks like a place in the checkout: folders with a slash at their end, files with one inside."""
    places = re.findall(r"`((?:data|esparse|figures|findings|notebooks|\.ci)/[\w./-]*)`", EVERYTHING)
    told = re.findall(r"data/results/[\w-]+\.json", EVERYTHING)
    measured = [path for path in told if not re.search("speed_full|small-16", path)]  # these two are not yet measured
    assert len(places) > 5 and len(measured) >= 5
    for place in [*places, *measured, ".pre-commit-config.yaml", ".ci/run", ".ci/drift", ".ci/engines"]:
        assert (checkout() / place).exists(), place
    results = {path.name for path in (data_folder() / "results").glob("*.json")}
    assert results <= set(LINK.findall(PAGES["data/results/README.md"]))


def commands() -> list[str]:
    lines = [line for fence in FENCE.findall(EVERYTHING) for line in fence.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", FENCE.sub("", EVERYTHING))
    return [line.partition("-m esparse ")[2] for line in lines if "-m esparse " in line]


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_every_command_is_one(command):
    arguments = __main__._parser().parse_args(shlex.split(command))
    if arguments.call is __main__._notebooks:
        read = [nbformat.read(path, as_version=4) for path in notebooks.find(arguments.names)]
        declared = {name for notebook in read for name in notebooks.parameters(notebook)}
        assert notebooks.parse_settings(arguments.settings).keys() <= declared


def test_every_command_and_option_is_explained():
    """Each command has a section of its own, which names all of its options."""
    sections = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", PAGES["esparse/COMMANDS.md"], flags=re.M | re.S))
    (commands,) = __main__._parser()._subparsers._group_actions
    assert sections.keys() == commands.choices.keys()
    for name, parser in commands.choices.items():
        for option in {word for action in parser._actions for word in action.option_strings} - {"-h", "--help"}:
            assert re.search(rf"`{option}[` ]|[ ]{option} ", sections[name]), f"{name} {option}"
    known = {word for parser in commands.choices.values() for action in parser._actions for word in action.option_strings}
    assert set(re.findall(r"`(--[\w-]+)`", PAGES["esparse/COMMANDS.md"])) <= known
    assert all(f"`{method}`" in sections["prune"] for method in SEARCH_METHODS)


@pytest.mark.slow
def test_the_example_in_python_runs(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"^```python\n(.*?)^```", README, flags=re.M | re.S)
    evaluate = esparse.evaluate
    monkeypatch.setattr(esparse, "evaluate", lambda *arguments: evaluate(*arguments, limit=4))  # the rest as it stands
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert "arithmetic_problems" in capsys.readouterr().out
    assert json.loads((tmp_path / "pruned-here" / "config.json").read_text())["num_local_experts"] == 6


def test_commands_are_single_lines_and_ci_calls_one():
    found = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(found) == 2
    assert found[0].endswith("-m esparse notebooks") and found[1].endswith("-m pytest")
    assert all("pip install -q -r requirements.txt" in line for line in found)
    assert "README.md" in (checkout() / ".ci" / "run").read_text()


def test_tables_hold_every_notebook_figure_and_task():
    for path in notebooks.find():
        assert re.search(rf"^\| \[{path.stem}\]\(notebooks/{path.name}\) \| .+ \| [1-9]\d* \| [1-9]\d+ \|$", README, flags=re.M)
    gallery_page = PAGES["figures/README.md"]
    for name, figure in figures.figures().items():
        assert f"| `{name}` | {name[:2]} | {figure.paper} |" in gallery_page, name
        assert f"![{figure.shows}]({name}.png)" in gallery_page, name
    for path in (data_folder() / "tasks").glob("*.yaml"):
        assert f"| `{path.stem}` |" in PAGES["data/README.md"]


def test_the_public_address_stands_in_one_place():
    address = notebooks.address()
    assert tomllib.loads((checkout() / "pyproject.toml").read_text())["project"]["urls"]["Repository"] == address
    owner = address.removeprefix("https://github.com/")
    for path in [*FILES, *notebooks.find()]:
        found = re.findall(r"(?:github\.com|colab\.research\.google\.com/github)/([\w.-]+/esparse)\b", path.read_text())
        assert set(found) <= {owner}
    for path in notebooks.find():
        assert path.read_text().count(owner) == 2  # its badge, and the setup cell


def test_the_serving_page_shows_the_engines_as_they_ran():
    rows = json.loads((data_folder() / "results" / "engines.json").read_text())["rows"]
    assert with_engines.table(rows) in PAGES["esparse/SERVING.md"]
    ways = (*with_engines.WAYS, *with_engines.SKIPPING)
    assert all(row[way].get("passed") for row in rows if row["full"].get("passed") for way in ways if way in row)


def test_numbers_of_the_results_are_those_measured():
    """What the pages say of the benchmarks is what their files say."""
    results, read = PAGES["data/results/README.md"], lambda name: json.loads((data_folder() / "results" / name).read_text())
    gains = {row["r"]: row["decoding"]["1"]["gain"] for row in read("speed_medium.json")["rows"]}
    told = re.search(r"decoding is ([\d.]+) times as fast at r = 8 .*? ([\d.]+) at r = 6, ([\d.]+) at r = 4", results)
    assert [float(word) for word in told.groups()] == [pytest.approx(gains[r], abs=0.006) for r in (8, 6, 4)]
    streamed = read("stream_cpu.json")
    for page in (README, results):
        assert f"{streamed['source_gb']:.1f} GB" in page and f"{streamed['peak_gb']:.2f} GB" in page
    assert f"decoding at batch 1 is {told[1]} times as fast" in README
    rows = [row for row in read("domain_specific.json")["rows"] if row["seed"] == 0 and row["betas"] is None]
    on_web = {(row["r"], row["method"]): row["perplexity"][0] for row in rows if row["calibration"] in (None, "web")}
    told = re.search(r"perplexity on web text rises from ([\d.]+) to ([\d.]+)\. .* rises to ([\d.]+)\. In the paper", README)
    expected = [on_web[8, "none"], on_web[6, "enumerate"], on_web[6, "frequency"]]
    assert [float(word) for word in told.groups()] == [pytest.approx(value, abs=0.006) for value in expected]
