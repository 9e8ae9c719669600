"""Paths of the shipped data, and writing outputs so that they are either absent or complete."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import metadata, util
from pathlib import Path
from typing import Any

from huggingface_hub.utils import WeakFileLock

PACKAGE = Path(__file__).resolve().parent
SHIPPED = ("tiny", "tiny-scratch")  # the trained models in `data/`: experts copied from a dense model, or from nothing


def checkout() -> Path:
    """The root of the checkout. Raises FileNotFoundError where the package was installed without its notebooks."""
    if (PACKAGE.parent / "notebooks").is_dir():
        return PACKAGE.parent
    raise FileNotFoundError("The notebooks are not part of the installed package: clone the repository and run this there.")


def data_folder() -> Path:
    """`data/` of the checkout, or its copy inside an installed package."""
    installed = PACKAGE / "data"
    return installed if installed.is_dir() else PACKAGE.parent / "data"


def local_folder(source: str | Path) -> Path | None:
    """The folder of the model with this name; None for a hub id. Raises FileNotFoundError for a path that does not exist."""
    if str(source) in SHIPPED:
        return data_folder() / str(source)
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_absolute() or str(source).startswith("."):
        raise FileNotFoundError(f"There is no model folder at {source}.")
    return None


def refuse_existing(path: str | Path) -> Path:
    """Returns the path. Raises FileExistsError if it exists, NotADirectoryError if it would lie below a file."""
    if Path(path).exists():
        raise FileExistsError(f"{path} already exists: choose another destination, or remove it first.")
    if (file := next((parent for parent in Path(path).parents if parent.is_file()), None)) is not None:
        raise NotADirectoryError(f"{path} cannot be made, since {file} is a file.")
    return Path(path)


@contextmanager
def new_folder(destination: str | Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `destination` at the end, or removed after an error."""
    destination = refuse_existing(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as temporary:
        yield Path(temporary)
        os.chmod(temporary, 0o755)  # temporary folders are private
        os.replace(temporary, destination)


def made_once(path: Path, make: Callable[[Path], object]) -> Path:
    """The path, made by make(path) unless it exists. Of several processes one makes it and the others wait, except for the
    ranks of one job, which make it together."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock")
        with nullcontext() if "RANK" in os.environ else WeakFileLock(lock):
            if not path.exists():
                make(path)
        lock.unlink(missing_ok=True)  # who still waits for it finds the path
    return path


def write_text(path: str | Path, text: str) -> None:
    """Write a file under a temporary name, then rename it: a reader sees the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: str | Path, what: str) -> Any:
    """Parsed JSON. The errors (FileNotFoundError, OSError, ValueError) say `what` the file should be."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no {what} at {path}.") from None
    except OSError as error:
        raise type(error)(f"{path} cannot be read as a {what}: {error.strerror}.") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a readable {what} ({error}): it may be truncated; make it again.") from None


def paper(table: str) -> list | dict:
    """One of the paper's tables as numbers ("table2", "betas", ...), from `data/paper.json`."""
    return read_json(data_folder() / "paper.json", "file of the paper's numbers")[table]


def measured(name: str) -> dict:
    """Figures measured once and shipped, with device, versions and date, from `data/results/NAME.json`."""
    return read_json(data_folder() / "results" / f"{name}.json", "file of measured figures")


def versions() -> dict[str, str]:
    """The versions that results depend on."""
    names = ("torch", "transformers", "datasets", "lm_eval", "numpy")
    return {name: metadata.version(name) for name in names if util.find_spec(name)}


def digest(*parts: Any) -> str:
    """A digest of JSON values, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
