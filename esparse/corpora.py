"""Calibration sets: documents from the hub, local files or the tiny model's corpora, packed as in the paper."""

import random
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .documents import FORMS, Document, alternating, plain, read_documents, to_document
from .files import data_folder

_MATH_SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory")
_MATH_SUBJECTS += ("prealgebra", "precalculus")
HUB = {  # the data set of each corpus, and its configurations
    "c4": ("allenai/c4", (None,)),
    "math": ("EleutherAI/hendrycks_math", _MATH_SUBJECTS),
    "gsm8k": ("openai/gsm8k", ("main",)),
    "metamath": ("meta-math/MetaMathQA", (None,)),
}
SYNTHETIC = ("web", "arithmetic")
# The held-out split of each corpus that has one.
HELD_OUT = {"web": "heldout", "arithmetic": "heldout", "c4": "validation", "math": "test", "gsm8k": "test"}
_C4_FILES = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}


def calibration_tokens(
    corpus: str, tokenizer, *, sequences: int = 128, length: int = 2048, seed: int = 42, protocol: str = "paper"
) -> torch.Tensor:
    """A calibration set: int64 token ids [sequences, length].

    corpus: "c4", "math", "gsm8k" or "metamath" (from the hub, or its local cache), "web" or "arithmetic" (synthetic,
    offline), each with an optional split as in "gsm8k/test", "c4/validation" or "web/heldout"; or a path to a file of
    .txt, .json, .jsonl, .ndjson, .csv or .tsv, each also gzipped, .parquet or .arrow, or to a folder of them. A path that
    exists takes precedence over a hub corpus of the same name; "/heldout" after it takes a fifth of its documents, "/rest"
    the others. A mix joins corpora with plus signs and takes their sequences in turn: "code.jsonl*3+c4" takes three of the
    first, then one of the second. Records hold a text or a conversation, in the fields at the head of `documents.py`.
    A conversation goes through the tokenizer's chat template; without one, blank lines join its turns.
    protocol "paper" (A.7): shuffle with the seed, take the first 16 x sequences documents, tokenise one by one with BOS,
    pack each batch of 1,000 documents, drop its remainder, cut to length.
    Raises ValueError for an unknown corpus or protocol, a malformed line, turns that the template refuses, or too little
    text; FileNotFoundError for a path that does not exist; OSError where the hub cannot be reached or denies access.
    """
    if protocol != "paper":
        raise ValueError(f"Unknown protocol {protocol!r}: there is 'paper'.")
    if sequences < 1 or length < 1:
        raise ValueError(f"sequences and length must be at least 1, got {sequences} and {length}.")
    mix = parts(corpus)
    if len(mix) > 1:
        rounds, shape = -(-sequences // sum(weight for _, weight in mix)), {"length": length, "seed": seed}
        drawn = [calibration_tokens(name, tokenizer, sequences=rounds * weight, **shape) for name, weight in mix]
        return torch.cat([rows.unflatten(0, (rounds, -1)) for rows in drawn], 1).flatten(0, 1)[:sequences]
    corpus = mix[0][0]
    every = documents(corpus)
    order = list(range(len(every)))
    random.Random(seed).shuffle(order)
    chosen, rows, total = [to_document(every[i]) for i in order[: 16 * sequences]], [], 0
    for start in range(0, len(chosen), 1000):
        packed = [token for document in chosen[start : start + 1000] for token in _ids(tokenizer, document)]
        rows += [packed[i : i + length] for i in range(0, len(packed) - length + 1, length)]
        total += len(packed)
    if len(rows) < sequences:
        raise ValueError(
            f"The corpus {corpus!r} is too short: its {len(chosen)} documents have {total} tokens, which pack into {len(rows)} "
            f"sequences of {length}, not {sequences}; ask for fewer or shorter sequences, or take a larger corpus."
        )
    return torch.tensor(rows[:sequences])


def _ids(tokenizer, document: Document) -> list[int]:
    if isinstance(document, str) or not getattr(tokenizer, "chat_template", None):
        return tokenizer(plain(document), verbose=False).input_ids
    from jinja2 import TemplateError

    reason = None
    for turns in (document, alternating(document)):
        try:  # the template writes BOS itself
            return tokenizer.apply_chat_template(turns, return_dict=False, tokenizer_kwargs={"verbose": False})
        except (TemplateError, TypeError, ValueError) as error:
            reason = reason or _first_line(error)
    roles = ", ".join(turn["role"] for turn in document[:8])
    raise ValueError(
        f"The tokenizer's chat template refuses ({reason}) the conversation of {roles} that begins "
        f"{plain(document)[:40]!r}: leave it out of the corpus."
    )


def parts(corpus: str) -> list[tuple[str, int]]:
    """The corpora of a mix with their weights: ("a", 3) and ("b", 1) for "a*3+b". An existing path may contain these signs.
    Raises ValueError for an empty name, or a weight that is no whole number from 1 on."""
    words, mix = corpus.split("+"), []
    while words:
        heads = [_weighted("+".join(words[:count])) for count in range(len(words), 0, -1)]
        name, weight = next((head for head in heads if _exists(head[0]) and head[1].isdecimal()), heads[-1])
        if not name or not weight.isdecimal() or not int(weight):
            raise ValueError(f"{corpus!r} is no corpus: a weight is a whole number from 1 on, as in code.jsonl*3+c4.")
        mix.append((name, int(weight)))
        words = words[name.count("+") + 1 :]
    return mix


def _weighted(word: str) -> tuple[str, str]:
    """A corpus and its weight as written; "1" where there is none."""
    if _exists(word):
        return word, "1"
    name, sign, weight = word.rpartition("*")
    return (name.strip(), weight.strip()) if sign else (word.strip(), "1")


def _exists(name: str) -> bool:
    return is_local(name) or is_local(re.sub("/(rest|heldout)$", "", name))


def is_local(name: str) -> bool:
    """Whether a name is the path of a file or folder, which takes precedence over a hub corpus of the same name."""
    return name not in ("", *SYNTHETIC, *(f"{corpus}/heldout" for corpus in SYNTHETIC)) and Path(name).exists()


def of_each(corpus: str, split: Callable[[str], str | None]) -> str:
    """A corpus, or each part of a mix, followed by its split. Raises ValueError if a folder already holds that name."""
    words = []
    for name, weight in parts(corpus):
        part = split(name)
        if part and is_local(name) and (Path(name) / part).exists():
            raise ValueError(f"{name} holds {part!r}, but a run uses this name for a part of its documents: rename it.")
        words.append((f"{name}/{part}" if part else name) + f"*{weight}" * (weight > 1))
    return "+".join(words)


def held_out(corpus: str) -> str:
    """The documents of a corpus that no calibration set has: its held-out split, or every fifth of a file or folder."""
    return of_each(corpus, lambda name: "heldout" if is_local(name) else HELD_OUT.get(name))


def documents(corpus: str) -> Sequence[Document]:
    """The documents of a corpus; see `calibration_tokens`. Of the hub: the records, since a C4 shard has 356,317 of them and
    few are drawn; `to_document` converts these."""
    if is_local(corpus):
        return read_documents(Path(corpus))
    path, _, part = corpus.rpartition("/")
    if part in ("heldout", "rest") and is_local(path):
        held_out = lambda document: zlib.crc32(plain(document).encode()) % 5 == 0  # noqa: E731
        return [document for document in read_documents(Path(path)) if held_out(document) == (part == "heldout")]
    name, _, split = corpus.partition("/")
    if name in SYNTHETIC:
        shipped = data_folder() / "corpora" / f"{name}.{split or 'calibration'}.jsonl.gz"
        if not shipped.exists():
            raise ValueError(f"The corpus {corpus!r} has no such split: there are '{name}' and '{name}/heldout'.")
        return read_documents(shipped)
    if name in HUB:
        return _hub_records(name, split or "train")
    if Path(corpus).suffix:
        return read_documents(Path(corpus))
    known = ", ".join([*HUB, *SYNTHETIC])
    raise ValueError(f"Unknown corpus {corpus!r}: choose from {known}, or give a path to {FORMS}, or to a folder of them.")


def _hub_records(name: str, split: str):
    from datasets import concatenate_datasets, load_dataset

    (page, configurations), options = HUB[name], {"split": split}
    alternatives = "offline there are 'web' and 'arithmetic', or give a path to a local file"
    if name == "c4":
        if split not in _C4_FILES:
            raise ValueError(f"The corpus 'c4' has no split {split!r}: there are {', '.join(_C4_FILES)}.")
        options["data_files"] = {split: _C4_FILES[split]}
    if name == "math":
        alternatives += "; MATH was taken down by a rights holder in 2025, and 'gsm8k' is the usual substitute"
    load = lambda: concatenate_datasets([load_dataset(page, own, **options) for own in configurations])  # noqa: E731
    return from_hub(load, f"the corpus {name!r}", f"datasets/{page}", alternatives)


def from_hub(load: Callable, what: str, page: str, alternatives: str):
    """`load()`. If the hub fails, raises a one-sentence PermissionError with the page that grants access (401, 403), or
    ConnectionError with the alternatives."""
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
    """The first HTTP status in a chain of exceptions."""
    while error is not None:
        if (status := getattr(getattr(error, "response", None), "status_code", None)) is not None:
            return status
        error = error.__cause__ or error.__context__
    return None
