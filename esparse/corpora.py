"""Calibration sets: documents from the hub, from local files or made here, packed as the paper packs them."""

import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from .documents import FORMS, Document, alternating, plain, read_documents, to_document
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


def calibration_tokens(
    corpus: str, tokenizer, *, sequences: int = 128, length: int = 2048, seed: int = 42, protocol: str = "paper"
) -> torch.Tensor:
    """A calibration set: int64 token ids [sequences, length].

    corpus: "c4", "math", "gsm8k" or "metamath" (from the hub, or its local cache), "web" or "arithmetic" (synthetic,
    offline), each with an optional split as in "gsm8k/test", "c4/validation" or "web/heldout"; or a path to a file of
    .txt, .json, .jsonl, .ndjson, .csv or .tsv, packed as .gz or not, .parquet or .arrow, or to a folder of them, which goes
    before the hub's where it is called like one, with "/heldout" behind it for the fifth of its documents that "/rest"
    leaves out; or several with plus signs between them, whose sequences then take turns: of "code.jsonl*3+c4" three of the
    first, then one of the second.
    Records may have `text`, `problem` and `solution`, `question` and `answer`, `query` and `response`, or `content`, which
    are read as plain text; or `messages` or `conversations`, `instruction` (with `input` or `context`) and `output` or
    `response`, or `prompt` and `completion` or `response`, which go through the tokenizer's chat template, and where it has
    none are joined by blank lines. Records without text are left out.
    protocol "paper" (A.7): shuffle with the seed, take the first 16 x sequences documents, tokenise one by one with BOS,
    pack each batch of 1,000 documents, drop its remainder, cut to length.
    Raises ValueError for an unknown corpus or protocol, a malformed line, turns that the template refuses, or too little
    text; FileNotFoundError for a path that is not there; OSError where the hub cannot be reached or does not grant access.
    """
    if protocol != "paper":
        raise ValueError(f"Unknown protocol {protocol!r}: there is 'paper'.")
    if sequences < 1 or length < 1:
        raise ValueError(f"sequences and length must be at least 1, got {sequences} and {length}.")
    mixed = parts(corpus)
    if len(mixed) > 1:
        rounds, shape = -(-sequences // sum(weight for _, weight in mixed)), {"length": length, "seed": seed}
        drawn = [calibration_tokens(name, tokenizer, sequences=rounds * weight, **shape) for name, weight in mixed]
        return torch.cat([rows.unflatten(0, (rounds, -1)) for rows in drawn], 1).flatten(0, 1)[:sequences]
    corpus = mixed[0][0]
    found = documents(corpus)
    order = list(range(len(found)))
    random.Random(seed).shuffle(order)
    chosen = [found[i] for i in order[: 16 * sequences]]
    rows = [row for start in range(0, len(chosen), 1000) for row in _pack(chosen[start : start + 1000], tokenizer, length)]
    if len(rows) < sequences:
        total = sum(len(_ids(tokenizer, document)) for document in chosen)
        raise ValueError(
            f"The corpus {corpus!r} is too short: its {len(chosen)} documents have {total} tokens, which pack into {len(rows)} "
            f"sequences of {length}, not {sequences}; ask for fewer or shorter sequences, or take a larger corpus."
        )
    return torch.tensor(rows[:sequences])


def _ids(tokenizer, document: Document) -> list[int]:
    if isinstance(document, str) or not getattr(tokenizer, "chat_template", None):
        return tokenizer(plain(document), verbose=False).input_ids
    from jinja2 import TemplateError

    refused = None
    for turns in (document, alternating(document)):
        try:  # the template writes BOS itself
            return tokenizer.apply_chat_template(turns, return_dict=False, tokenizer_kwargs={"verbose": False})
        except (TemplateError, TypeError, ValueError) as error:
            refused = refused or error
    roles = ", ".join(turn["role"] for turn in document[:8])
    raise ValueError(
        f"The tokenizer's chat template refuses ({_first_line(refused)}) the conversation of {roles} that begins "
        f"{plain(document)[:40]!r}: leave it out of the corpus."
    )


def _pack(some: Sequence[Document], tokenizer, length: int) -> Iterator[list[int]]:
    joined = [token for document in some for token in _ids(tokenizer, document)]
    for start in range(0, len(joined) - length + 1, length):
        yield joined[start : start + length]


def parts(corpus: str) -> list[tuple[str, int]]:
    """The corpora of a mix, each with its weight: those of "a*3+b" are ("a", 3) and ("b", 1). A path that is there stays
    whole, whatever it holds. Raises ValueError for a weight that is no whole number from 1 on, or an empty name."""
    words, found = corpus.split("+"), []
    while words:
        heads = [_weighted("+".join(words[:count])) for count in range(len(words), 0, -1)]
        name, weight = next((head for head in heads if _is_there(head[0]) and head[1].isdecimal()), heads[-1])
        if not name or not weight.isdecimal() or not int(weight):
            raise ValueError(f"{corpus!r} is no corpus: a weight is a whole number from 1 on, as in code.jsonl*3+c4.")
        found.append((name, int(weight)))
        words = words[name.count("+") + 1 :]
    return found


def _weighted(word: str) -> tuple[str, str]:
    """A corpus and its weight as written, "1" where there is none."""
    if _is_there(word):
        return word, "1"
    name, _, weight = word.rpartition("*") if "*" in word else (word, "", "1")
    return name.strip(), weight.strip()


def _is_there(name: str) -> bool:
    return is_local(name) or is_local(re.sub("/(rest|heldout)$", "", name))


def is_local(name: str) -> bool:
    """Whether a name is that of a file or folder that is there, which goes before a corpus of the hub called alike."""
    return name not in ("", *SYNTHETIC, *(f"{one}/heldout" for one in SYNTHETIC)) and Path(name).exists()


def documents(corpus: str) -> Sequence[Document]:
    """The documents of a corpus, see `calibration_tokens`."""
    if is_local(corpus):
        return read_documents(Path(corpus))
    path, _, part = corpus.rpartition("/")
    if part in ("heldout", "rest") and is_local(path):
        return [one for one in read_documents(Path(path)) if _is_held_out(one) == (part == "heldout")]
    name, _, split = corpus.partition("/")
    if name in SYNTHETIC:
        path = data_folder() / "corpora" / f"{name}.{split or 'calibration'}.jsonl.gz"
        if not path.exists():
            raise ValueError(f"The corpus {corpus!r} has no such split: there are '{name}' and '{name}/heldout'.")
        return read_documents(path)
    if name in HUB:
        return _Documents(_from_hub(name, split or "train"))
    if Path(corpus).suffix:
        return read_documents(Path(corpus))
    known = ", ".join([*HUB, *SYNTHETIC])
    raise ValueError(f"Unknown corpus {corpus!r}: choose from {known}, or give a path to {FORMS}, or to a folder of them.")


def _is_held_out(document: Document) -> bool:
    return zlib.crc32(plain(document).encode()) % 5 == 0


class _Documents(Sequence):
    """The documents of a hub data set, read as they are asked for: a C4 shard has 356,317."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index):
        return to_document(self.dataset[index])


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
