"""The files of a checkpoint's folder: its weight files, each tensor's place in them, and the side files."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers.dynamic_module_utils import get_relative_imports

from ..files import read_json
from ..moe.layers import LORA

INDEX, SINGLE, CONFIG, ADAPTER = "model.safetensors.index.json", "model.safetensors", "config.json", "adapter_config.json"
PLAN, REPORT, SKIPPING_FILE, CHECK = "plan.json", "pruning_report.json", "esparse.json", "check.json"

# The files beside the weights. Written anew for the result:
REWRITTEN = (CONFIG, INDEX, "README.md")
# Copied, together with the code that an auto_map names:
CARRIED = (
    "generation_config.json",
    *("tokenizer.json", "tokenizer.*.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "tokenizer.model.*", "*.tiktoken", "tekken.json", "*.spm"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "audio_tokenizer_config.json"),
    *("LICEN[CS]E*", "Licen[cs]e*", "licen[cs]e*", "*_LICEN[CS]E*", "COPYING*", "NOTICE*", "Notice*", "USE_POLICY*"),
)
# Not copied, because they describe the source (betas still hold where all experts stay):
OUTDATED = dict.fromkeys((PLAN, REPORT), "of an earlier pruning")
OUTDATED |= {SKIPPING_FILE: "betas of the model before pruning", CHECK: "of the model before pruning"}
# Copied where the weights stay quantised:
QUANTISERS = ("quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json")
# All other files are not copied either; these hold weights:
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")

# The dtypes that are read, for weights and for tables from token ids to experts.
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
DTYPES |= {"I32": torch.int32, "I64": torch.int64}
# The bits of each of safetensors' dtypes.
BITS = dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
BITS |= dict.fromkeys(("U16", "I16", "F16", "BF16"), 16) | dict.fromkeys(("U32", "I32", "F32"), 32)
BITS |= dict.fromkeys(("U64", "I64", "F64", "C64"), 64) | {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_APART = re.compile(r"\.experts\.\d+\.(gate|up|down)_proj\.")  # llm-compressor's names, published ones in some families
_LONGEST_HEADER = 100_000_000  # bytes, safetensors' own limit


class Entry(NamedTuple):
    """A tensor in bytes `start` to `stop` of a file. Shape and dtype are those after dequantisation, if it is quantised."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: not in DTYPES, such as bytes
    stored: str  # safetensors' name of the dtype on disk, a key of BITS
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """The bytes that the tensor takes in memory."""
        return prod(self.shape) * self.dtype.itemsize if self.dtype else self.stop - self.start

    def check(self, name: str, whole_numbers: bool) -> None:
        """ValueError unless the dtype holds weights, or whole numbers."""
        if self.dtype is None or self.dtype.is_floating_point == whole_numbers:
            known = [kind for kind, dtype in DTYPES.items() if dtype.is_floating_point != whole_numbers]
            raise ValueError(f"{self.file}: tensor {name} is of dtype {self.stored}; it must be {', '.join(known)}.")


def inside(folder: Path, name: str) -> Path:
    """The path of a file in a folder. Raises ValueError where its name, or a link, leads out of the folder; links in the hub's
    cache may lead to the cache's blobs."""
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{folder} names the file {name}, which lies outside it: only files within a checkpoint are read.")
    target, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    # A snapshot in the hub's cache links to its repository's blobs, which may link to those of the whole cache.
    snapshots = (parent.parent for parent in root.parents if parent.name == "snapshots")
    repository = next((parent for parent in snapshots if parent.name.startswith("models--")), None)
    blobs = [] if repository is None else [repository / "blobs", repository.parent / "blobs"]
    if not any(target.is_relative_to(allowed) for allowed in (root, *blobs)):
        raise ValueError(f"{path} is a link to {target}, outside the folder: put the file itself there, if it belongs to it.")
    return path


def json_object(folder: Path, name: str, what: str) -> dict:
    """A JSON object in a file of a folder. Raises FileNotFoundError, or ValueError as `inside` and for other JSON."""
    value = read_json(inside(folder, name), what)
    if not isinstance(value, dict):
        raise ValueError(f"{folder / name} is no {what}: it holds no JSON object.")
    return value


def refuse_adapter(folder: Path) -> None:
    """ValueError for a folder with a LoRA adapter: transformers applies it where peft is installed, and only there."""
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


def named(folder: Path, available: Container[str] | None = None) -> tuple[list[str], dict[str, str]]:
    """The names of a folder's weight files, and its index from tensors to files (empty if there is none).

    available: names of existing files (None: look in the folder). Raises FileNotFoundError without safetensors, ValueError
    for an adapter, a distributed checkpoint, an invalid index, and names that lead out of the folder.
    """
    refuse_adapter(folder)
    if any(folder.glob("shard-?????-model-?????-of-?????.safetensors")):
        raise ValueError(f"{folder} is a distributed checkpoint (shard-...): save it as one model first.")
    file = json_object(folder, CONFIG, "model config").get("transformers_weights")
    if file is not None and not str(file).endswith((".safetensors", ".safetensors.index.json")):
        raise ValueError(f"The config of {folder} names {file} as its weights: only safetensors and an index are read.")
    names = (SINGLE, INDEX) if file is None else (file,)  # in the order that transformers looks for them
    existing = [name for name in names if (name in available if available is not None else (folder / name).is_file())]
    if not existing:
        raise FileNotFoundError(f"There are no safetensors in {folder}: no {' and no '.join(names)} is there.")
    if existing[0].endswith(".safetensors"):
        return existing[:1], {}
    places = _weight_map(folder, existing[0])
    return sorted(set(places.values())), places


def _weight_map(folder: Path, name: str) -> dict[str, str]:
    index = json_object(folder, name, "safetensors index")
    places = index.get("weight_map")
    if not (isinstance(places, dict) and places and all(isinstance(file, str) for file in places.values())):
        raise ValueError(f"{folder / name} is not a safetensors index: it has no weight_map from tensors to files.")
    if not isinstance(index.get("metadata"), dict):
        raise ValueError(f'{folder / name} has no metadata, without which transformers reads no index: add "metadata": {{}}.')
    return places


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder's weights. Raises what `named` does, and ValueError where one is missing."""
    paths = [inside(folder, name) for name in named(folder)[0]]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"The index of {folder} names {path.name}, which is not in it: download it again.")
    return paths


def tensors(folder: Path) -> dict[str, Entry]:
    """Every tensor in a folder's weight files, by name. Like transformers, it ignores which file an index gives for a tensor.

    Raises what `weight_files` does, and ValueError naming the file and the tensor for an invalid header, a tensor of the
    index that no file has, one that two files have, and one of an adapter, which transformers would leave out.
    """
    entries: dict[str, Entry] = {}
    for path in weight_files(folder):
        found = header(path)
        if both := sorted(found.keys() & entries.keys()):
            other = entries[both[0]].file
            raise ValueError(f"{other} and {path} both have a tensor {both[0]}: nothing says which of them counts.")
        entries |= found
    for name, file in named(folder)[1].items():
        if name not in entries:
            raise ValueError(f"{folder / file} has no tensor {name}, which the index says it has: download it again.")
    if adapter := next(filter(LORA.search, entries), None):
        raise ValueError(f"{folder} holds an adapter (tensor {adapter}): merge it first (merge_and_unload of peft).")
    return entries


def refuse_missing(folder: str | Path, missing: Sequence[str], others: Iterable[str]) -> None:
    """ValueError where a folder lacks tensors: transformers would make them up. others: names that it does not read."""
    if not missing:
        return
    more = f" and {len(missing) - 1} more" * (len(missing) > 1)
    apart = next(filter(_APART.search, others), None)
    why = f": it has {apart}, a name of llm-compressor that transformers does not read" if apart else ""
    raise ValueError(f"{folder} has no tensor {missing[0]}{more}, which its config asks for{why}.")


def header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file. Raises ValueError naming the file and the tensor where the header is invalid, or the
    tensors overlap, leave a gap, or do not end with the file: https://huggingface.co/docs/safetensors/index#format."""
    with path.open("rb") as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise _corrupt(path, f"its header claims {length} bytes, the file has {size}")
        told = _parsed(path, file.read(length))
    end, before = 8 + length, "the header"
    entries = {name: _entry(path, name, value, end, size) for name, value in told.items() if name != "__metadata__"}
    for start, stop, name in sorted((entry.start, entry.stop, name) for name, entry in entries.items()):
        if start != end:
            raise _corrupt(path, f"tensor {name} {'overlaps' if start < end else 'leaves a gap after'} {before}")
        end, before = stop, name
    if end != size:
        raise _corrupt(path, f"the last tensor, {before}, ends at byte {end}, the file at {size}")
    return entries


def _corrupt(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} is truncated or corrupt ({what}): download it again.")


def _parsed(path: Path, text: bytes) -> dict:
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        "".join(entries).encode("utf-8")  # raises for half a surrogate pair in a name
    except (ValueError, RecursionError, TypeError) as error:
        raise _corrupt(path, f"its header is no JSON that safetensors allows: {error}") from None
    notes = entries.get("__metadata__", {}) if isinstance(entries, dict) else None
    if not (isinstance(notes, dict) and all(isinstance(value, str) for value in notes.values())):
        raise _corrupt(path, "its header maps no names, or its metadata are no text")
    return entries


def _unique(pairs: list[tuple]) -> dict:
    (name, count), *_ = Counter(name for name, _ in pairs).most_common(1) or [("", 1)]
    if count > 1:
        raise ValueError(f"{name} is given twice")
    return dict(pairs)


def _entry(path: Path, name: str, told: dict, start: int, size: int) -> Entry:
    """A tensor's entry, from what the header tells. start: the first byte after the header; size: the file's."""
    try:
        dtype, shape, (first, last) = told["dtype"], told["shape"], told["data_offsets"]
        whole = isinstance(dtype, str) and isinstance(shape, list) and {int}.issuperset(map(type, (*shape, first, last)))
        valid = whole and min(*shape, first, last) >= 0 and max(*shape, first, last) < 2**63
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise _corrupt(path, f"tensor {name} has no dtype, shape and offsets of whole numbers")
    if dtype not in BITS:
        raise ValueError(f"{path}: tensor {name} is of dtype {dtype}, which is none of safetensors'.")
    if not first <= last <= size - start:
        raise _corrupt(path, f"tensor {name} ends at byte {start + last}, the file at {size}")
    if prod(shape) * BITS[dtype] != (last - first) * 8:
        raise _corrupt(path, f"tensor {name} of {dtype} {shape} has {last - first} bytes")
    return Entry(path, tuple(shape), DTYPES.get(dtype), dtype, start + first, start + last)


def write_tensors(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file as `write_file` does."""
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    write_file(path, lambda temporary: save_file(state, temporary, metadata={"format": "pt"}))


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file under a temporary name, then rename it. Raises OSError where the disk is full."""
    temporary = path.with_name(f".{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (SafetensorError, OSError) as error:
        raise OSError(f"Could not write {path} ({error}): make room, then ask for the same again.") from None
    finally:
        temporary.unlink(missing_ok=True)


def side_files(folder: Path, same_experts: bool, quantised: bool = False) -> tuple[list[str], dict[str, str]]:
    """The names of the files that are copied into a folder made from this one, and of those that are not, with the reason.

    same_experts: whether the result keeps all experts, so that betas still hold. quantised: whether its weights stay quantised.
    Raises ValueError where the config or a file to be copied is a link that leads out of the folder.
    """
    names = [path.name for path in folder.iterdir() if path.is_file()]
    names += [f"{path.parent.name}/{path.name}" for path in folder.glob("additional_chat_templates/*") if path.is_file()]
    copied = {name for name in names if any(fnmatchcase(name, pattern) for pattern in CARRIED)}
    copied |= {SKIPPING_FILE} & set(names) if same_experts else set()
    copied |= set(QUANTISERS) & set(names) if quantised else set()
    copied |= _code(folder, [name for name in (CONFIG, *copied) if name.endswith("config.json")])
    for name in (CONFIG, *copied):
        inside(folder, name)
    weights = {path.relative_to(folder).as_posix() for path in weight_files(folder)}
    known = {name.split("/")[0] for name in (*copied, *weights, *REWRITTEN)}
    others = sorted(path for path in folder.iterdir() if path.name not in known)
    why = lambda path: "other weights" if path.suffix in WEIGHTS else "no part of a checkpoint"  # noqa: E731
    return sorted(copied), {path.name + "/" * path.is_dir(): OUTDATED.get(path.name, why(path)) for path in others}


def _code(folder: Path, configs: Iterable[str]) -> set[str]:
    """The Python files of the folder that the `auto_map` of a config names, and those that they import from it."""
    waiting, code = [], set()
    for config in configs:
        auto_map = json_object(folder, config, "config").get("auto_map")
        for value in auto_map.values() if isinstance(auto_map, dict) else ():
            references = [ref for ref in (value if isinstance(value, list) else [value]) if isinstance(ref, str)]
            waiting += [f"{ref.split('.')[0]}.py" for ref in references if "--" not in ref]  # else of another repository
    while waiting:
        name = waiting.pop()
        if name not in code and inside(folder, name).is_file():
            code.add(name)
            waiting += [f"{module}.py" for module in get_relative_imports(folder / name)]
    return code
