"""What esparse needs around it. `check` refuses what is too old before anything imports it; run as a script, as on Colab
after cloning, this adds what is missing to an environment that somebody else made, and leaves alone what a running kernel
holds already. Nothing here imports the package, or what it asks about."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

FLOORS = {"torch": "2.11", "transformers": "5.17"}
KEPT = ("torch", "numpy", "ipywidgets")  # never replaced under a kernel, or under the page in front of it
ADDED = ("accelerate", "datasets", "ipywidgets", "lm-eval", "matplotlib", "pandas", "safetensors", "seaborn", "tqdm")


def installed() -> dict[str, str]:
    """The versions of what is named here and installed; of what is in memory already, that one's."""
    found = {}
    for name in {*FLOORS, *KEPT, *ADDED}:
        try:
            found[name] = getattr(sys.modules.get(name), "__version__", None) or metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def too_old(found: Mapping[str, str], name: str) -> bool:
    """Whether a package, if it is there, is older than its floor."""
    numbers = [int(part) if part.isdigit() else 0 for part in found.get(name, FLOORS[name]).split("+")[0].split(".")]
    return numbers < [int(part) for part in FLOORS[name].split(".")]


def check(found: Mapping[str, str] | None = None) -> None:
    """Raises ImportError, in one sentence, where torch or transformers is older than esparse can use."""
    found = installed() if found is None else found
    advice = {"torch": "take a newer runtime, or upgrade it", "transformers": "upgrade it alone, then restart the kernel once"}
    for name, floor in FLOORS.items():
        if too_old(found, name):
            raise ImportError(f"esparse needs {name} {floor} or newer, found {found[name]}: {advice[name]}.")


def wanted(found: Mapping[str, str]) -> list[str]:
    """What to ask pip for: what is missing, and a newer transformers. Raises ImportError for a torch that is missing or
    too old, since it is not ours to replace."""
    check({name: found[name] for name in ("torch",) if name in found})
    if "torch" not in found:
        raise ImportError(f"esparse needs torch {FLOORS['torch']} or newer, found none: install the one for this machine.")
    missing = [name for name in ADDED if name not in found]
    newer = "transformers" not in found or too_old(found, "transformers")
    return [*missing, f"transformers>={FLOORS['transformers']}"] if newer else missing


def complete(root: Path) -> str:
    """Put the checkout at `root` on the path and add what is missing; returns a sentence for the user."""
    found = installed()
    added = wanted(found)
    if added:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as pins:
            pins.write("".join(f"{name}=={found[name]}\n" for name in KEPT if name in found))
            pins.flush()
            subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-c", pins.name, *added], check=True)
    sys.path.insert(0, str(root))
    told = f"esparse is at {root}" + (f"; added {', '.join(added)}." if added else "; nothing had to be added.")
    if too_old(found, "transformers") and "transformers" in sys.modules:
        told += f" transformers {found['transformers']} is still in memory: restart the kernel once."
    return told


if __name__ == "__main__":
    print(complete(Path(__file__).resolve().parent.parent))
