"""Calibration sets: documents from the hub, from local files or made here, packed as the paper packs them."""

import gzip
import json
import random
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from .files import data_folder

HUB = {"c4": "allenai/c4", "math": "EleutherAI/hendrycks_math", "gsm8k": "openai/gsm8k", "metamath": "meta-math/MetaMathQA"}
SYNTHETIC = ("web", "arithmetic")
_MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
_C4_FILES = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
# What a record may hold, in the order tried; two fields are joined by a space, as the paper does for MATH.
_FIELDS = (("text",), ("problem", "solution"), ("question", "answer"), ("query", "response"))


def calibration_tokens(
    corpus: str, tokenizer, *, sequences: int = 128, length: int = 2048, seed: int = 42, protocol: str = "paper"
) -> torch.Tensor:
    """A calibration set: int64 token ids [sequences, length].

    corpus: "c4", "math", "gsm8k" or "metamath" (from the hub, or its local cache), "web" or "arithmetic" (synthetic,
    offline), each with an optional split as in "gsm8k/test", "c4/validation" or "web/heldout"; or a path to a .txt,
    .json(.gz) or .jsonl(.gz) file, with "/heldout" behind it for the fifth of its documents that "/rest" leaves out; or
    several with plus signs between them, whose sequences then take turns. Records may have `text`, `problem` and
    `solution`, `question` and `answer`, or `query` and `response`.
    protocol "paper" (A.7): shuffle with the seed, take the first 16 x sequences documents, tokenise one by one with BOS,
    pack each batch of 1,000 documents, drop its remainder, cut to length.
    Raises ValueError for an unknown corpus or protocol, a malformed line, or too little text; FileNotFoundError for a
    path that is not there; OSError where the hub cannot be reached or does not grant access.
    """
    if protocol != "paper":
        raise ValueError(f"Unknown protocol {protocol!r}: there is 'paper'.")
    if sequences < 1 or length < 1:
        raise ValueError(f"sequences and length must be at least 1, got {sequences} and {length}.")
    if "+" in corpus and not Path(corpus).exists():
        names = corpus.split("+")
        share = -(-sequences // len(names))
        parts = [calibration_tokens(name, tokenizer, sequences=share, length=length, seed=seed) for name in names]
        return torch.stack(parts, 1).flatten(0, 1)[:sequences]
    texts = documents(corpus)
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    chosen = [texts[i] for i in order[: 16 * sequences]]
    rows = [row for start in range(0, len(chosen), 1000) for row in _pack(chosen[start : start + 1000], tokenizer, length)]
    if len(rows) < sequences:
        found = sum(len(_ids(tokenizer, text)) for text in chosen)
        raise ValueError(
            f"The corpus {corpus!r} is too short: its {len(chosen)} documents have {found} tokens, which pack into {len(rows)} "
            f"sequences of {length}, not {sequences}; ask for fewer or shorter sequences, or take a larger corpus."
        )
    return torch.tensor(rows[:sequences])


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, verbose=False).input_ids


def _pack(texts: Sequence[str], tokenizer, length: int) -> Iterator[list[int]]:
    joined = [token for text in texts for token in _ids(tokenizer, text)]
    for start in range(0, len(joined) - length + 1, length):
        yield joined[start : start + length]


def documents(corpus: str) -> Sequence[str]:
    """The documents of a corpus, see `calibration_tokens`."""
    name, _, split = corpus.partition("/")
    if name in SYNTHETIC:
        path = data_folder() / "corpora" / f"{name}.{split or 'calibration'}.jsonl.gz"
        if not path.exists():
            raise ValueError(f"The corpus {corpus!r} has no such split: there are '{name}' and '{name}/heldout'.")
        return read_documents(path)
    path, _, part = corpus.rpartition("/")
    if part in ("heldout", "rest") and Path(path).is_file():
        return [text for text in read_documents(Path(path)) if (zlib.crc32(text.encode()) % 5 == 0) == (part == "heldout")]
    if name in HUB and not Path(corpus).exists():
        return _Texts(_from_hub(name, split or "train"))
    if Path(corpus).suffix or Path(corpus).exists():
        return read_documents(Path(corpus))
    known = ", ".join([*HUB, *SYNTHETIC])
    raise ValueError(
        f"Unknown corpus {corpus!r}: choose from {known}, or give a path to a .txt, .json(.gz) or .jsonl(.gz) file."
    )


def read_documents(path: Path) -> list[str]:
    """The documents of a local file: blank lines separate them in .txt; .json holds a list or, as in the hub's C4 shards,
    one object a line, like .jsonl. Raises FileNotFoundError, or ValueError naming the file and line."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no corpus file at {path}: give a path to a .txt, .json(.gz) or .jsonl(.gz) file.")
    suffix = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    if suffix not in (".txt", ".json", ".json.gz", ".jsonl", ".jsonl.gz"):
        raise ValueError(f"{path} is not a .txt, .json(.gz) or .jsonl(.gz) file.")
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): it may be truncated or in another encoding than UTF-8.") from None
    if suffix == ".txt":
        found = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    else:
        found = [record_text(record, where) for record, where in _records(text, path)]
    if not found:
        raise ValueError(f"The corpus {path} is empty: it has 0 tokens.")
    return found


def _records(text: str, path: Path) -> Iterator[tuple[Mapping, str]]:
    """Each record and where it stands, for error messages."""
    if text.lstrip().startswith("["):
        yield from ((record, f"{path}, entry {i}") for i, record in enumerate(_parse(text, str(path)), 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _parse(line, where), where


def _parse(text: str, where: str):
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON ({error}).") from None


def record_text(record: Mapping, where: str = "record") -> str:
    """The text of a record: `text`, or a question and its answer by one of their names, joined by a space."""
    for fields in _FIELDS:
        if isinstance(record, Mapping) and all(isinstance(record.get(field), str) for field in fields):
            return " ".join(record[field] for field in fields)
    raise ValueError(f"{where} has neither 'text' nor a question and its answer ('problem' and 'solution', ...).")


class _Texts(Sequence):
    """The texts of a hub data set, read as they are asked for: a C4 shard has 356,317."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index):
        return record_text(self.dataset[index])


def _from_hub(name: str, split: str):
    from datasets import concatenate_datasets, load_dataset

    def load():
        if name == "c4":
            return load_dataset(HUB[name], data_files={split: _C4_FILES[split]}, split=split)
        if name == "math":
            return concatenate_datasets([load_dataset(HUB[name], subject, split=split) for subject in _MATH_SUBJECTS])
        return load_dataset(HUB[name], "main" if name == "gsm8k" else None, split=split)

    if name == "c4" and split not in _C4_FILES:
        raise ValueError(f"The corpus 'c4' has no split {split!r}: there are {', '.join(_C4_FILES)}.")
    alternatives = "offline there are 'web' and 'arithmetic', or give a path to a local file"
    if name == "math":
        alternatives += "; MATH was taken down by a rights holder in 2025, and 'gsm8k' is the usual substitute"
    return from_hub(load, f"the corpus {name!r}", f"datasets/{HUB[name]}", alternatives)


def from_hub(load: Callable, what: str, page: str, alternatives: str):
    """`load()`, with the hub's ways to fail turned into one sentence.

    Raises PermissionError naming the page to ask at (401, 403), or ConnectionError naming what works instead.
    """
    try:
        return load()
    except (OSError, ValueError) as error:
        if _status(error) in (401, 403):
            raise PermissionError(
                f"The hub does not grant access to {what}: ask for it at https://huggingface.co/{page}, then set HF_TOKEN."
            ) from error
        raise ConnectionError(f"Could not get {what} from the hub ({_first_line(error)}): {alternatives}.") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _status(error: BaseException | None) -> int | None:
    """The HTTP status in a chain of exceptions, if there is one."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        error = error.__cause__ or error.__context__
    return None
