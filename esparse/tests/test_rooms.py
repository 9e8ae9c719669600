"""The rooms: a room imports only rooms above it in the table, only the command line prints, its help imports no torch."""

import ast
import importlib.util
import subprocess
import sys

import pytest

from esparse.files import PACKAGE

ROOMS = (
    *("environment", "machine", "files", "style", "documents", "corpora", "kernels", "vllm_plugin"),
    *("moe", "tiny_model", "tracing", "pruning", "checkpoints", "recovery", "measure", "explorer", "experiments"),
)
ENTRANCES = ("__init__", "__main__")  # of the package: they may import from all rooms
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.relative_to(PACKAGE).parts[0] != "tests"
}


def imported(module: str, tree: ast.Module) -> set[str]:
    """The rooms that a module imports from anywhere, inside functions too."""
    package = f"esparse.{module}".rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(name, package) if node.level else name
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("esparse.")}


def test_every_module_lies_in_a_room():
    assert {module.partition(".")[0] for module in MODULES} == {*ROOMS, *ENTRANCES}


@pytest.mark.parametrize("module", [name for name in MODULES if name not in ENTRANCES])
def test_a_room_imports_only_rooms_to_its_left(module):
    room = module.partition(".")[0]
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    assert imported(module, MODULES[module]) <= allowed


def test_the_order_is_read_from_every_kind_of_import():
    text = "import esparse.a.b\nfrom esparse.c import x\nfrom . import d\ndef f():\n    from .e.g import y\n    import torch"
    assert imported("room", ast.parse(text)) == {"a", "c", "d", "e"}
    assert imported("room.module", ast.parse("from . import own\nfrom ..other import x\nfrom .. import third")) == {
        *("room", "other", "third")
    }


def test_only_the_command_line_prints():
    """But for what a file does where it is run as a script, as the notebooks' setup cell runs one on Colab."""
    parts = [(name, part) for name, tree in MODULES.items() for part in tree.body if not isinstance(part, ast.If)]
    printing = {name for name, part in parts for node in ast.walk(part) if isinstance(node, ast.Name) and node.id == "print"}
    assert printing == {"__main__"}


def test_the_help_takes_no_torch():
    script = "import sys\nfrom esparse.__main__ import main\n"
    script += "try: main(['--help'])\nfinally: assert not {'torch', 'transformers'} & {*sys.modules}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and "prune" in done.stdout, done.stderr
