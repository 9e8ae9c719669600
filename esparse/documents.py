"""Documents: the text or the conversation of a record, and the records in files of common formats."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from itertools import chain, groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

Document = str | list[dict]  # a text, or turns as chat templates take them: with role, content and further keys

COLUMNS, TABLES = {".csv": ",", ".tsv": "\t"}, (".parquet", ".arrow")
TEXTS = (".txt", ".json", ".jsonl", ".ndjson", *COLUMNS)
FORMS = f"{', '.join(TEXTS)} (these also .gz), {' or '.join(TABLES)}"
# Files that the hub's tools put beside a data set.
_METADATA = re.compile(r"dataset_infos?\.json|dataset_dict\.json|state\.json|cache-.*\.arrow")

# The fields that a record may have, in the order tried: texts, joined by a space as the paper joins MATH's; turns; and a
# question, in one or two fields, with its answer.
_FIELDS = (("text",), ("problem", "solution"), ("question", "answer"), ("query", "response"), ("content",))
_TURNS = ("messages", "conversations", "conversation")
_EXCHANGES = (("instruction", "input", "output"), ("instruction", "context", "response"))
_EXCHANGES += (("prompt", None, "completion"), ("prompt", None, "response"))
_PAIRS = ", ".join(f"{question} and {answer}" for question, _, answer in _EXCHANGES)
_KNOWN = f"text in {', '.join(map(' and '.join, _FIELDS))}, {_PAIRS}, and turns of role and content in {', '.join(_TURNS)}"
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}


def plain(document: Document) -> str:
    """A document as text: the contents of its turns, with blank lines between them."""
    return document if isinstance(document, str) else "\n\n".join(turn["content"] for turn in document if turn["content"])


def alternating(turns: list[dict]) -> list[dict]:
    """Turns as every chat template takes them: user and assistant in turn, the user first. Every role but the assistant
    becomes the user, neighbouring turns of one side are joined, and assistant turns before the first user turn are dropped."""
    said = [("assistant" if turn["role"] == "assistant" else "user", turn["content"]) for turn in turns if turn["content"]]
    sides = groupby(said, key=itemgetter(0))
    result = [{"role": role, "content": "\n\n".join(content for _, content in side)} for role, side in sides]
    return result[1:] if result and result[0]["role"] == "assistant" else result


def read_documents(path: Path) -> list[Document]:
    """The documents of a file, or of the files in a folder and its subfolders, in the order of their names.

    Blank lines separate the documents of a .txt. JSON holds records one after another, each on one line or several, or one
    list of records, which may be the only list in an object. The first line of .csv and .tsv names the fields. Records
    without text are left out; so are hidden files and other formats in a folder.
    Raises FileNotFoundError, ValueError naming the file and line, or ImportError where pyarrow is missing.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no corpus file at {path}: give a path to {FORMS}, or to a folder of them.")
    records = chain.from_iterable(map(_records, _inside(path) if path.is_dir() else [path]))
    documents = [document for record in records if plain(document := to_document(*record)).strip()]
    if not documents:
        raise ValueError(f"The corpus {path} is empty: it has 0 tokens.")
    return documents


def _inside(folder: Path) -> list[Path]:
    names = [path.relative_to(folder) for path in folder.rglob("*") if _format(path) and path.is_file()]
    names = [name for name in names if not _METADATA.fullmatch(name.name) and not any(part[0] == "." for part in name.parts)]
    if not names:
        raise ValueError(f"The folder {folder} holds no file that is {FORMS}.")
    return [folder / name for name in sorted(names, key=Path.as_posix)]


def _format(path: Path) -> str | None:
    """The suffix of a file's format, in lower case; None if it is none of `FORMS`."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in TEXTS or (suffix in TABLES and not name.endswith(".gz")) else None


def _records(path: Path) -> Iterator[tuple[Any, str]]:
    """Each record of a file, and its place for error messages."""
    suffix = _format(path)
    if suffix is None:
        raise ValueError(f"{path} is not a {FORMS} file.")
    if suffix in TABLES:
        return ((row, f"{path}, row {i}") for i, row in enumerate(_table(path, suffix), 1))
    text = _decoded(path)
    if suffix == ".txt":
        return ((part.strip(), str(path)) for part in re.split(r"\n\s*\n", text))
    return _rows(text, path, COLUMNS[suffix]) if suffix in COLUMNS else _json_records(text, path)


def _decoded(path: Path) -> str:
    """The text of a file, gzipped or not, without a byte-order mark, with line feeds as line ends."""
    content = path.read_bytes()
    try:
        text = (gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): it may be truncated or in another encoding than UTF-8.") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _table(path: Path, suffix: str) -> list[dict]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ImportError(f"Reading {path} needs pyarrow: pip install pyarrow.") from None
    try:
        file = pyarrow.BufferReader(path.read_bytes())
        return (parquet.read_table(file) if suffix == ".parquet" else pyarrow.ipc.open_stream(file).read_all()).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): it may be truncated.") from None


def _rows(text: str, path: Path, delimiter: str) -> Iterator[tuple[dict, str]]:
    csv.field_size_limit(2**31 - 1)  # a field may hold a book
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row:
                raise ValueError(f"{place} has more fields than the first line names: quote those that hold {delimiter!r}.")
            yield row, place
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read after line {reader.line_num} ({error}).") from None


def _json_records(text: str, path: Path) -> Iterator[tuple[Any, str]]:
    values = _json_values(text, path)
    first = list(islice(values, 2))
    records = _listed(first[0][0]) if len(first) == 1 else None
    return chain(first, values) if records is None else ((entry, f"{path}, entry {i}") for i, entry in enumerate(records, 1))


def _json_values(text: str, path: Path) -> Iterator[tuple[Any, str]]:
    """Each JSON value of a text, and the line where it begins."""
    decoder, begin, position, line = json.JSONDecoder(), re.compile(r"[^\s\ufeff]"), 0, 1
    while match := begin.search(text, position):
        line += text.count("\n", position, match.start())
        try:
            value, position = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {line} is not valid JSON ({error}).") from None
        yield value, f"{path}, line {line}"
        line += text.count("\n", match.start(), position)


def _listed(value: Any) -> list | None:
    """The records in a file's only value: a list, or the only list in an object. None where the value is itself a record."""
    if any(True for _ in _readings(value)):
        return None
    if isinstance(value, Mapping):
        lists = [entry for entry in value.values() if isinstance(entry, list)]
        records = len(value) == 1 or all(isinstance(entry, Mapping) for entries in lists for entry in entries)
        return lists[0] if len(lists) == 1 and records else None
    return value if isinstance(value, list) else None


def to_document(record: Any, place: str = "record") -> Document:
    """The document of a record: its first reading that has text. Raises ValueError for a record without known fields."""
    readings = list(_readings(record))
    if not readings:
        keys = ", ".join(str(key)[:40] for key in list(record)[:12]) if isinstance(record, Mapping) else ""
        keys = f"the keys {keys}" if keys else "no keys"
        raise ValueError(f"{place} has neither 'text' nor another known form: it has {keys}; known are {_KNOWN}.")
    return next((document for document in readings if plain(document).strip()), readings[-1])


def _readings(record: Any) -> Iterator[Document]:
    """The documents that a record may be read as, in the order of the known fields."""
    if isinstance(record, str):
        yield _text(record)
    elif isinstance(record, list):
        yield from filter(None, [_turns(record)])
    elif isinstance(record, Mapping):
        texts = ([_text(record[field]) for field in fields] for fields in _FIELDS if record.keys() >= set(fields))
        yield from (" ".join(parts) for parts in texts if None not in parts)
        turns = [_turns(record[field]) for field in _TURNS if field in record]
        turns += [_exchange(record, *fields) for fields in _EXCHANGES if record.keys() >= {fields[0], fields[2]}]
        yield from (_with_system(record, document) for document in turns if document is not None)


def _text(value: Any) -> str | None:
    """A string, number or null as text; None for other values. Replaces lone surrogates, which no tokenizer takes."""
    if value is None or value != value:  # null, NaN
        return ""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value).encode(errors="replace").decode()
    return None


def _turns(value: Any) -> list[dict] | None:
    """Turns with `role` and `content`, or `from` and `value`; None for anything but a list of them."""
    if not isinstance(value, list | None):
        return None
    turns = [_turn(turn) if isinstance(turn, Mapping) else None for turn in value or []]
    return None if None in turns else turns


def _turn(turn: Mapping) -> dict | None:
    more = {key: value for key, value in turn.items() if key not in ("role", "from", "content", "value")}
    role = turn.get("role") or turn.get("from")
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    if isinstance(content, list):  # parts: keep text, drop images and the like
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        content = "".join(_text(part) or "" for part in parts)
    if not role or not isinstance(role, str) or _text(content) is None or not turn.keys() & {"content", "value", "tool_calls"}:
        return None
    return more | {"role": _ROLES.get(role.lower(), role.lower()), "content": _text(content)}


def _exchange(record: Mapping, question: str, context: str | None, answer: str) -> Document | None:
    """A question and an answer as turns; as text where one of them is empty."""
    asked, answered = _side("user", record[question], record.get(context)), _side("assistant", record[answer], None)
    if asked is None or answered is None:
        return None
    turns = asked + answered
    return turns if plain(asked).strip() and plain(answered).strip() else plain(turns)


def _side(role: str, value: Any, more: Any) -> list[dict] | None:
    """One side of an exchange: the turns in `value`, or one turn made of one or two texts."""
    texts = [_text(value), _text(more)]
    if None in texts:
        return _turns(value)
    return [{"role": role, "content": "\n\n".join(text for text in texts if text.strip())}]


def _with_system(record: Mapping, document: Document) -> Document:
    """Turns, with the record's `system` message before them if it has one."""
    system = _text(record.get("system"))
    if not system or isinstance(document, str) or not document or document[0]["role"] == "system":
        return document
    return [{"role": "system", "content": system}, *document]
