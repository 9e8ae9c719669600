"""The packages that esparse needs. `check` refuses versions that are too old before esparse imports them. The notebooks' setup
cells run this module as a script: it installs missing packages, and keeps Colab's torch, numpy and ipywidgets. The module
imports neither esparse nor the packages it checks."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path

FLOORS = {"torch": "2.11", "transformers": "5.17"}
KEPT = ("torch", "numpy", "ipywidgets")  # never replaced: a running kernel or the notebook page already uses them
ADDED = ("accelerate", "datasets", "ipywidgets", "lm-eval", "matplotlib", "pandas", "safetensors", "seaborn", "tqdm")


def installed() -> dict[str, str]:
    """The versions of the packages above that are installed; of an imported one, the version in memory."""
    versions = {}
    for name in {*FLOORS, *KEPT, *ADDED}:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = getattr(sys.modules.get(name), "__version__", None) or metadata.version(name)
    return versions


def too_old(versions: Mapping[str, str], name: str) -> bool:
    """Whether a package is installed and older than its floor."""
    numbers = [int(part) if part.isdigit() else 0 for part in versions.get(name, FLOORS[name]).split("+")[0].split(".")]
    return numbers < [int(part) for part in FLOORS[name].split(".")]


def check(versions: Mapping[str, str] | None = None) -> None:
    """Raises ImportError where torch or transformers is too old for esparse."""
    versions = installed() if versions is None else versions
    advice = {"torch": "take a newer runtime, or upgrade it", "transformers": "upgrade it alone, then restart the kernel once"}
    for name, floor in FLOORS.items():
        if too_old(versions, name):
            raise ImportError(f"esparse needs {name} {floor} or newer, found {versions[name]}: {advice[name]}.")


def wanted(versions: Mapping[str, str]) -> list[str]:
    """The requirements for pip: missing packages, and a newer transformers. Raises ImportError where torch is missing or too
    old, since the right build depends on the machine."""
    check({name: version for name, version in versions.items() if name == "torch"})
    if "torch" not in versions:
        raise ImportError(f"esparse needs torch {FLOORS['torch']} or newer, found none: install the one for this machine.")
    missing = [name for name in ADDED if name not in versions]
    newer = "transformers" not in versions or too_old(versions, "transformers")
    return [*missing, f"transformers>={FLOORS['transformers']}"] if newer else missing


def complete(root: Path) -> str:
    """Install what is missing and put the checkout at `root` on the path; returns a sentence for the user."""
    versions = installed()
    added = wanted(versions)
    if added:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as pins:
            pins.write("".join(f"{name}=={versions[name]}\n" for name in KEPT if name in versions))
            pins.flush()
            subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-c", pins.name, *added], check=True)
    sys.path.insert(0, str(root))
    sentence = f"esparse is at {root}" + (f"; added {', '.join(added)}." if added else "; nothing had to be added.")
    if too_old(versions, "transformers") and "transformers" in sys.modules:
        sentence += f" transformers {versions['transformers']} is still in memory: restart the kernel once."
    return sentence


if __name__ == "__main__":
    print(complete(Path(__file__).resolve().parent.parent))
