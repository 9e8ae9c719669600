"""The files of a checkpoint's folder: which weights it means, where each tensor lies, and what belongs beside them."""

import json
import os
from collections import Counter
from collections.abc import Container, Iterable
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import NamedTuple

from transformers.dynamic_module_utils import get_relative_imports

from .files import read_json

INDEX, SINGLE, CONFIG, ADAPTER = "model.safetensors.index.json", "model.safetensors", "config.json", "adapter_config.json"
PLAN, REPORT, SKIPPING_FILE = "plan.json", "pruning_report.json", "esparse.json"

# What becomes of the files beside the weights. These are written anew for the result,
REWRITTEN = (CONFIG, INDEX, "README.md")
# these are copied, with the code that an auto_map names,
CARRIED = (
    "generation_config.json",
    *("tokenizer.json", "tokenizer.*.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "tokenizer.model.*", "*.tiktoken", "tekken.json", "*.spm"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "audio_tokenizer_config.json"),
    *("LICEN[CS]E*", "Licen[cs]e*", "licen[cs]e*", "*_LICEN[CS]E*", "COPYING*", "NOTICE*", "Notice*", "USE_POLICY*"),
)
# these speak of the model as it was before, the betas only where experts go,
FORMER = {PLAN: "of an earlier pruning", REPORT: "of an earlier pruning", SKIPPING_FILE: "betas of the model before pruning"}
# and everything else stays where it is.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")

BITS = dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
BITS |= dict.fromkeys(("U16", "I16", "F16", "BF16"), 16) | dict.fromkeys(("U32", "I32", "F32"), 32)
BITS |= dict.fromkeys(("U64", "I64", "F64", "C64"), 64) | {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_LONGEST = 100_000_000  # bytes of a header, as safetensors has it


class Place(NamedTuple):
    """Where a tensor lies: bytes `start` to `stop` of a file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name of it
    start: int
    stop: int


# --- names --------------------------------------------------------------------------------------------------------------


def inside(folder: Path, name: str) -> Path:
    """The path of a file by its name in a folder. Raises ValueError where the name, or a link, leads out of the folder;
    links of the hub's cache may lead to its blobs."""
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{folder} names the file {name}, which lies outside it: only files within a checkpoint are read.")
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(room) for room in _rooms(Path(os.path.realpath(folder)))):
        raise ValueError(f"{path} is a link to {target}, outside the folder: put the file itself there, if it belongs to it.")
    return path


def json_object(folder: Path, name: str, what: str) -> dict:
    """A JSON file of a folder. Raises FileNotFoundError, or ValueError for one that is no object, or lies outside."""
    found = read_json(inside(folder, name), what)
    if not isinstance(found, dict):
        raise ValueError(f"{folder / name} is no {what}: it holds no JSON object.")
    return found


def _rooms(root: Path) -> list[Path]:
    """Where a folder's files may really lie: in it, and, for a snapshot in the hub's cache, among the blobs of its
    repository, which may themselves be links to those of the whole cache."""
    snapshots = (parent.parent for parent in root.parents if parent.name == "snapshots")
    repository = next((parent for parent in snapshots if parent.name.startswith("models--")), None)
    return [root] if repository is None else [root, repository / "blobs", repository.parent / "blobs"]


# --- weights ------------------------------------------------------------------------------------------------------------


def refuse_adapter(folder: Path) -> None:
    """ValueError for a folder with a LoRA adapter, which transformers loads with peft and leaves out without it."""
    if not (folder / ADAPTER).is_file():
        return
    base = json_object(folder, ADAPTER, "adapter config").get("base_model_name_or_path")
    if (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder} holds an adapter ({ADAPTER}) beside a model: transformers adds it where peft is installed and leaves it "
            "out elsewhere, so merge it first (merge_and_unload of peft), or take that file out to prune the model without it."
        )
    raise ValueError(
        f"{folder} is an adapter of {base}, not a model: merge it first (merge_and_unload of peft), and give the merged folder."
    )


def named(folder: Path, here: Container[str] | None = None) -> tuple[list[str], dict[str, str]]:
    """The files that hold a folder's weights, and what its index, if it has one, says that each holds: tensors to files.

    here: the files that there are (those in the folder, if None). Raises FileNotFoundError without safetensors, ValueError
    for an adapter, a distributed checkpoint, an index that is none, and names that lead out of the folder.
    """
    refuse_adapter(folder)
    if any(folder.glob("shard-?????-model-?????-of-?????.safetensors")):
        raise ValueError(f"{folder} is a distributed checkpoint (shard-...): save it as one model first.")
    asked = json_object(folder, CONFIG, "model config").get("transformers_weights")
    first = _first(folder, here, asked)
    if first.endswith(".safetensors"):
        return [first], {}
    places = _weight_map(folder, first)
    return sorted(set(places.values())), places


def _first(folder: Path, here: Container[str] | None, asked: str | None) -> str:
    """The safetensors file or the index that transformers takes, of those that are there; asked: the one of the config."""
    if asked is not None and not str(asked).endswith((".safetensors", ".safetensors.index.json")):
        raise ValueError(f"The config of {folder} names {asked} as its weights: only safetensors and an index are read.")
    names = (SINGLE, INDEX) if asked is None else (asked,)
    is_there = here.__contains__ if here is not None else lambda name: (folder / name).is_file()
    if (found := next(filter(is_there, names), None)) is None:
        raise FileNotFoundError(f"There are no safetensors in {folder}: no {' and no '.join(names)} is there.")
    return found


def _weight_map(folder: Path, name: str) -> dict[str, str]:
    index = json_object(folder, name, "safetensors index")
    places = index.get("weight_map")
    if not (isinstance(places, dict) and places and all(isinstance(file, str) for file in places.values())):
        raise ValueError(f"{folder / name} is not a safetensors index: it has no weight_map from tensors to files.")
    if not isinstance(index.get("metadata"), dict):
        raise ValueError(f'{folder / name} has no metadata, without which transformers reads no index: add "metadata": {{}}.')
    return places


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a folder means. Raises what `named` does, and ValueError where one is missing."""
    return _present(folder, named(folder)[0])


def _present(folder: Path, names: Iterable[str]) -> list[Path]:
    paths = [inside(folder, name) for name in names]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"The index of {folder} names {path.name}, which is not in it: download it again.")
    return paths


def tensors(folder: Path) -> dict[str, Place]:
    """Every tensor that a folder means, by name: all that its files hold, as transformers reads them, whatever an index says.

    Raises what `weight_files` does, and ValueError naming the file and the tensor for a header that is not as safetensors
    demands, a tensor that the index names and no file has, and one that two files have.
    """
    names, promised = named(folder)
    found: dict[str, Place] = {}
    for path in _present(folder, names):
        for name, place in header(path).items():
            if name in found:
                raise ValueError(f"{found[name].file} and {path} both have a tensor {name}: nothing says which of them counts.")
            found[name] = place
    for name, file in promised.items():
        if name not in found:
            raise ValueError(f"{folder / file} has no tensor {name}, which the index says it has: download it again.")
    return found


# --- headers ------------------------------------------------------------------------------------------------------------


def header(path: Path) -> dict[str, Place]:
    """The tensors of a safetensors file. Raises ValueError naming the file and the tensor where the format is not kept:
    https://huggingface.co/docs/safetensors/index#format."""
    with path.open("rb") as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST):
            raise ValueError(_torn(path, f"its header claims {length} bytes, the file has {size}"))
        parts = _parsed(path, file.read(length))
    places = {name: _place(path, name, about, 8 + length, size) for name, about in parts.items() if name != "__metadata__"}
    _check_order(path, places, 8 + length, size)
    return places


def _torn(path: Path, what: str) -> str:
    return f"{path} is truncated or corrupt ({what}): download it again."


def _parsed(path: Path, text: bytes) -> dict:
    try:
        parts = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
        "".join(parts).encode("utf-8")  # names that are no text
    except (ValueError, RecursionError, TypeError) as error:
        raise ValueError(_torn(path, f"its header is no JSON that safetensors allows: {error}")) from None
    notes = parts.get("__metadata__", {}) if isinstance(parts, dict) else None
    if not (isinstance(notes, dict) and all(isinstance(value, str) for value in notes.values())):
        raise ValueError(_torn(path, "its header maps no names, or its metadata are no text"))
    return parts


def _once(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{Counter(name for name, _ in pairs).most_common(1)[0][0]} is given twice")
    return found


def _place(path: Path, name: str, about: dict, start: int, size: int) -> Place:
    """A tensor's place from what the header says of it, if that can be."""
    try:
        dtype, shape, (since, until) = about["dtype"], about["shape"], about["data_offsets"]
        counted = isinstance(dtype, str) and isinstance(shape, list) and {int}.issuperset(map(type, (*shape, since, until)))
        counted = counted and min(*shape, since, until) >= 0 and max(*shape, since, until) < 2**63
    except (KeyError, TypeError, ValueError):
        counted = False
    if not counted:
        raise ValueError(_torn(path, f"tensor {name} has no dtype, shape and offsets of whole numbers"))
    if dtype not in BITS:
        raise ValueError(f"{path}: tensor {name} is of dtype {dtype}, which is none of safetensors'.")
    if not since <= until <= size - start:
        raise ValueError(_torn(path, f"tensor {name} ends at byte {start + until}, the file at {size}"))
    if prod(shape) * BITS[dtype] != (until - since) * 8:
        raise ValueError(_torn(path, f"tensor {name} of {dtype} {shape} has {until - since} bytes"))
    return Place(path, tuple(shape), dtype, start + since, start + until)


def _check_order(path: Path, places: dict[str, Place], start: int, size: int) -> None:
    """ValueError unless the tensors follow one another without overlap or gap from the header to the file's end."""
    end, former = start, "the header"
    for begins, stops, name in sorted((place.start, place.stop, name) for name, place in places.items()):
        if begins != end:
            how = "overlaps" if begins < end else "leaves a gap after"
            raise ValueError(_torn(path, f"tensor {name} {how} {former}"))
        end, former = stops, name
    if end != size:
        raise ValueError(_torn(path, f"the last tensor, {former}, ends at byte {end}, the file at {size}"))


# --- beside the weights -------------------------------------------------------------------------------------------------


def side_files(folder: Path, same_experts: bool) -> tuple[list[str], dict[str, str]]:
    """What is copied into a folder made from this one, by name, and what is left behind, with why.

    same_experts: whether the result has the experts of the source, so that betas to skip with still hold. Raises ValueError
    for a file to be copied, or the config, that a link leads out of the folder for.
    """
    here = [path.name for path in folder.iterdir() if path.is_file()]
    here += [f"{path.parent.name}/{path.name}" for path in folder.glob("additional_chat_templates/*") if path.is_file()]
    copied = {name for name in here if any(fnmatchcase(name, pattern) for pattern in CARRIED)}
    copied |= {SKIPPING_FILE} & set(here) if same_experts else set()
    copied |= _code(folder, [name for name in (CONFIG, *copied) if name.endswith("config.json")])
    for name in (CONFIG, *copied):
        inside(folder, name)
    meant = {path.relative_to(folder).as_posix() for path in weight_files(folder)}
    tops = {name.split("/")[0] for name in (*copied, *meant, *REWRITTEN)}
    left = sorted(path for path in folder.iterdir() if path.name not in tops)
    return sorted(copied), {path.name + "/" * path.is_dir(): _why(path) for path in left}


def _why(path: Path) -> str:
    return FORMER.get(path.name) or ("other weights" if path.suffix in WEIGHTS else "no part of a checkpoint")


def _code(folder: Path, configs: Iterable[str]) -> set[str]:
    """The Python files in the folder that the `auto_map` of a config names, and those that they import from beside them."""
    named = [ref for name in configs for ref in _references(json_object(folder, name, "config"))]
    waiting, found = [f"{ref.split('.')[0]}.py" for ref in named if "--" not in ref], set()
    while waiting:
        name = waiting.pop()
        if name not in found and inside(folder, name).is_file():
            found.add(name)
            waiting += [f"{module}.py" for module in get_relative_imports(folder / name)]
    return found


def _references(config: dict) -> list[str]:
    """Every `module.Class` of a config's auto_map, some of which stand in pairs."""
    values = found.values() if isinstance(found := config.get("auto_map"), dict) else ()
    return [ref for value in values for ref in (value if isinstance(value, list) else [value]) if isinstance(ref, str)]
