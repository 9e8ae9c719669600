"""Environments made by others: old packages are named, missing ones added, and a kernel's packages keep their versions."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from esparse import environment, machine
from esparse.experiments import notebooks
from esparse.files import PACKAGE

COLAB = {"torch": "2.11.0+cu130", "numpy": "2.1.3", "ipywidgets": "7.7.1", "pandas": "2.3.0", "matplotlib": "3.10.0"}
COLAB |= {"transformers": "5.16.2", "accelerate": "1.13.0", "safetensors": "0.7.0", "seaborn": "0.13.2", "tqdm": "4.67.1"}


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ({"transformers": "5.16.2", "torch": "2.13.0"}, "transformers 5.17 or newer, found 5.16.2: upgrade it alone, then"),
        ({"transformers": "4.57.0", "torch": "2.13.0"}, "transformers 5.17 or newer, found 4.57.0"),
        ({"transformers": "5.17.0", "torch": "2.9.1+cu128"}, r"torch 2.11 or newer, found 2.9.1\+cu128: take a newer runtime"),
    ],
)
def test_what_is_too_old_is_named(found, sentence):
    with pytest.raises(ImportError, match=f"^esparse needs {sentence}"):
        environment.check(found)


@pytest.mark.parametrize("transformers", ["5.17", "5.17.0", "5.17.0.dev0", "5.100.1", "6.0.0rc1"])
def test_the_floor_and_what_is_newer_will_do(transformers):
    environment.check({"transformers": transformers, "torch": "2.11.0a0+git123"})


def test_only_what_is_missing_is_added():
    assert environment.wanted(COLAB) == ["datasets", "lm-eval", "transformers>=5.17"]
    assert environment.wanted(COLAB | {"transformers": "5.17.0", "datasets": "4.0.0", "lm-eval": "0.4.9"}) == []
    assert "ipywidgets" in environment.wanted({"torch": "2.13.0"})
    for torch in ({}, {"torch": "2.9.0"}):
        with pytest.raises(ImportError, match="needs torch 2.11 or newer"):
            environment.wanted(torch)


def test_pip_is_held_to_the_versions_that_are_there(monkeypatch, tmp_path):
    asked = []

    def pip(words, check):
        asked.append((words, Path(words[words.index("-c") + 1]).read_text()))

    monkeypatch.setattr(environment, "installed", lambda: COLAB)
    monkeypatch.setattr(environment.subprocess, "run", pip)
    monkeypatch.setattr(sys, "path", list(sys.path))
    told = environment.complete(tmp_path)
    ((words, pins),) = asked
    assert words[-3:] == ["datasets", "lm-eval", "transformers>=5.17"] and "--upgrade" not in words
    assert pins.split() == ["torch==2.11.0+cu130", "numpy==2.1.3", "ipywidgets==7.7.1"]
    assert sys.path[0] == str(tmp_path)
    assert "transformers 5.16.2 is still in memory: restart the kernel once." in told  # this process imported it


def python(site: Path, *words: str, **options) -> subprocess.CompletedProcess:
    """A fresh interpreter that finds what is installed here, but for esparse, and before it what lies in `site`."""
    where = [str(site), *(path for path in sys.path if path.endswith("site-packages"))]
    start = f"import site, sys; sys.path[:0] = {where!r}"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | options.pop("env", {})
    words = [sys.executable, "-S", "-c", "; ".join([start, *words])]
    return subprocess.run(words, capture_output=True, text=True, env=env, **options)


def test_an_old_transformers_ends_the_import_in_one_sentence(tmp_path):
    """Before anything of it is imported: the one that stands here would fail if it were."""
    about = tmp_path / "transformers-5.16.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.16.2\n")
    (tmp_path / "transformers.py").write_text("raise RuntimeError('imported')")
    shutil.copytree(PACKAGE, tmp_path / "esparse", ignore=shutil.ignore_patterns("tests", "__pycache__"))
    result = python(tmp_path, "import esparse", cwd=tmp_path)
    assert result.stderr.splitlines()[-1].startswith("ImportError: esparse needs transformers 5.17 or newer, found 5.16.2")


def test_the_setup_cell_fetches_the_code_and_adds_nothing_that_is_there(tmp_path):
    """A kernel with everything but esparse, as on Colab after the first start: cloned from a stand-in for the address."""
    remote = tmp_path / "remote"
    shutil.copytree(PACKAGE, remote / "esparse", ignore=shutil.ignore_patterns("tests", "__pycache__"))
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *words], cwd=remote, check=True)
    instead = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_VALUE_0": notebooks.address()}
    instead["GIT_CONFIG_KEY_0"] = f"url.{remote.as_uri()}.insteadOf"
    cell = nbformat.read(notebooks.find(["00"])[0], as_version=4).cells[1].source
    shell = "from IPython.core.interactiveshell import InteractiveShell; shell = InteractiveShell.instance()"
    (tmp_path / "here").mkdir()
    for _ in range(2):  # the second time the clone is there already
        run = [shell, f"shell.run_cell({cell!r}).raise_error()", "import esparse", "print(esparse.__file__)"]
        result = python(tmp_path / "nothing", *run, cwd=tmp_path / "here", env=instead)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "nothing had to be added" in result.stdout
        assert result.stdout.strip().endswith(str(Path("here", "esparse-checkout", "esparse", "__init__.py")))


GROUPS = {
    "version 2": ("0::/job/step", "", ("max", "current"), "anon 400\nactive_file 100\ninactive_file 150\n"),
    "version 1": (
        *("5:cpu,cpuacct:/other\n4:memory:/job/step", "memory", ("limit_in_bytes", "usage_in_bytes")),
        "active_file 1\ninactive_file 1\ntotal_active_file 100\ntotal_inactive_file 150\n",
    ),
}


@pytest.mark.parametrize("place", ["", "job", "job/step"])
@pytest.mark.parametrize("version", GROUPS)
def test_a_control_group_leaves_less_memory_than_the_machine_has(version, place, tmp_path):
    """In a container the group of /proc is one of the host, and the limit stands at the root."""
    own, kind, names, stat = GROUPS[version]
    (tmp_path / "cgroup").write_text(own + "\n")
    folder = tmp_path / "mounted" / kind / place
    folder.mkdir(parents=True)
    for name, text in zip((*names, "stat"), ("1000\n", "700\n", stat), strict=True):
        (folder / f"memory.{name}").write_text(text)
    assert [*machine._left_to_groups(tmp_path / "cgroup", tmp_path / "mounted")] == [1000 - (700 - 250)]
    (folder / f"memory.{names[0]}").write_text("max\n")
    assert [*machine._left_to_groups(tmp_path / "cgroup", tmp_path / "mounted")] == []


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="other systems do not tell the free memory")
def test_the_narrowest_limit_counts_if_there_is_one(monkeypatch):
    for left, limited in (([], False), ([7, 5, 10**18], True)):
        monkeypatch.setattr(machine, "_left_to_groups", lambda *_, left=left: left)
        assert (machine.free_memory(machine.torch.device("cpu")) == 5) is limited


def test_peak_memory_is_that_of_this_process_alone():
    held = bytearray(2**30)
    held[:: 2**12] = b"1" * 2**18
    child = subprocess.run(
        [sys.executable, "-c", "from esparse.machine import peak_memory; print(peak_memory())"], check=True, capture_output=True
    )
    assert 10e6 < int(child.stdout) < len(held) < machine.peak_memory()
