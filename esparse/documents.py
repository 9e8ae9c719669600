"""Documents: what a record holds, and what files as people have them hold, be it a text or the turns of a conversation."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

Document = str | list[dict]  # a text, or turns as chat templates take them: role, content and what else they have

COLUMNS, TABLES = {".csv": ",", ".tsv": "\t"}, (".parquet", ".arrow")
TEXTS = (".txt", ".json", ".jsonl", ".ndjson", *COLUMNS)
FORMS = f"{', '.join(TEXTS)} (these also .gz), {' or '.join(TABLES)}"
# What the hub's tools leave in the folder of a data set.
_BESIDE = re.compile(r"dataset_infos?\.json|dataset_dict\.json|state\.json|cache-.*\.arrow")

# What a record may hold, in the order tried: fields that a space joins, as the paper does for MATH; turns; what is asked, in
# two fields if need be, and what is answered.
_FIELDS = (("text",), ("problem", "solution"), ("question", "answer"), ("query", "response"), ("content",))
_TURNS = ("messages", "conversations", "conversation")
_EXCHANGES = (
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("prompt", None, "completion"),
    ("prompt", None, "response"),
)
_KNOWN = (
    f"text in {', '.join(map(' and '.join, _FIELDS))}, "
    f"{', '.join(f'{asked} and {answered}' for asked, _, answered in _EXCHANGES)}, "
    f"and turns of role and content in {', '.join(_TURNS)}"
)
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}


def plain(document: Document) -> str:
    """A document as text: of turns what they say, with blank lines between them."""
    return document if isinstance(document, str) else "\n\n".join(turn["content"] for turn in document if turn["content"])


def alternating(turns: list[dict]) -> list[dict]:
    """Turns as every chat template takes them: user and assistant in turn, the user first. Whoever is not the assistant
    counts as the user, what one side says in a row becomes one turn, and what the assistant says first is left out."""
    found: list[dict] = []
    for turn in turns:
        role = "assistant" if turn["role"] == "assistant" else "user"
        if turn["content"] and found and found[-1]["role"] == role:
            found[-1]["content"] += f"\n\n{turn['content']}"
        elif turn["content"] and (found or role == "user"):
            found.append({"role": role, "content": turn["content"]})
    return found


def read_documents(path: Path) -> list[Document]:
    """The documents of a file, or of the files in a folder and its subfolders, in the order of their names.

    Blank lines separate the documents of a .txt; JSON holds records one after another, on a line each or laid out over
    several, or one list of them, which may be the only list in an object; the first line of .csv and .tsv names the fields.
    Records without text are left out, and of a folder what is hidden or of another form.
    Raises FileNotFoundError, ValueError naming the file and line, or ImportError where pyarrow is needed and missing.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no corpus file at {path}: give a path to {FORMS}, or to a folder of them.")
    records = chain.from_iterable(_records(file) for file in (_inside(path) if path.is_dir() else [path]))
    found = [document for record in records if plain(document := to_document(*record)).strip()]
    if not found:
        raise ValueError(f"The corpus {path} is empty: it has 0 tokens.")
    return found


def _inside(folder: Path) -> list[Path]:
    files = {path.relative_to(folder): path for path in folder.rglob("*") if _form(path) and path.is_file()}
    shown = [name for name in files if not _BESIDE.fullmatch(name.name) and not any(part[0] == "." for part in name.parts)]
    if not shown:
        raise ValueError(f"The folder {folder} holds no file that is {FORMS}.")
    return [files[name] for name in sorted(shown, key=Path.as_posix)]


def _form(path: Path) -> str | None:
    """The suffix by which a file is read, in lower case; None where it is not."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in TEXTS or (suffix in TABLES and not name.endswith(".gz")) else None


def _records(path: Path) -> Iterator[tuple[Any, str]]:
    """Each record of a file and where it stands, for error messages."""
    form = _form(path)
    if form is None:
        raise ValueError(f"{path} is not a {FORMS} file.")
    if form in TABLES:
        return ((row, f"{path}, row {i}") for i, row in enumerate(_table(path, form), 1))
    text = _decoded(path)
    if form == ".txt":
        return ((part.strip(), str(path)) for part in re.split(r"\n\s*\n", text))
    return _rows(text, path, COLUMNS[form]) if form in COLUMNS else _objects(text, path)


def _decoded(path: Path) -> str:
    """The text of a file, packed or not, with or without a byte-order mark; lines end in a line feed."""
    content = path.read_bytes()
    try:
        text = (gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): it may be truncated or in another encoding than UTF-8.") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _table(path: Path, form: str) -> list[dict]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ImportError(f"Reading {path} needs pyarrow: pip install pyarrow.") from None
    try:
        file = pyarrow.BufferReader(path.read_bytes())
        table = parquet.read_table(file) if form == ".parquet" else pyarrow.ipc.open_stream(file).read_all()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): it may be truncated.") from None
    return table.to_pylist()


def _rows(text: str, path: Path, delimiter: str) -> Iterator[tuple[dict, str]]:
    csv.field_size_limit(2**31 - 1)  # a field may be a book
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row:
                raise ValueError(f"{where} has more fields than the first line names: quote those that hold {delimiter!r}.")
            yield row, where
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read after line {reader.line_num} ({error}).") from None


def _objects(text: str, path: Path) -> Iterator[tuple[Any, str]]:
    values = _values(text, path)
    first = list(islice(values, 2))
    listed = _listed(first[0][0]) if len(first) == 1 else None
    return chain(first, values) if listed is None else ((entry, f"{path}, entry {i}") for i, entry in enumerate(listed, 1))


def _values(text: str, path: Path) -> Iterator[tuple[Any, str]]:
    """Each JSON value of a text and the line it begins in."""
    decoder, begin, at, line = json.JSONDecoder(), re.compile(r"[^\s\ufeff]"), 0, 1
    while found := begin.search(text, at):
        line += text.count("\n", at, found.start())
        try:
            value, at = decoder.raw_decode(text, found.start())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {line} is not valid JSON ({error}).") from None
        yield value, f"{path}, line {line}"
        line += text.count("\n", found.start(), at)


def _listed(value: Any) -> list | None:
    """The records that a file's only value lists: its entries, or those of an object's only list; None for a record."""
    if any(True for _ in _readings(value)):
        return None
    if isinstance(value, Mapping):
        lists = [some for some in value.values() if isinstance(some, list)]
        records = len(value) == 1 or all(isinstance(entry, Mapping) for some in lists for entry in some)
        return lists[0] if len(lists) == 1 and records else None
    return value if isinstance(value, list) else None


def to_document(record: Any, where: str = "record") -> Document:
    """The document of a record, by the first known form that has text. Raises ValueError where the form is not known."""
    found = None
    for found in _readings(record):
        if plain(found).strip():
            return found
    if found is None:
        keys = ", ".join(str(key)[:40] for key in list(record)[:12]) if isinstance(record, Mapping) else ""
        raise ValueError(
            f"{where} has neither 'text' nor another known form: it has {f'the keys {keys}' if keys else 'no keys'}; known are "
            f"{_KNOWN}."
        )
    return found


def _readings(record: Any) -> Iterator[Document]:
    """What a record can be read as, form by form."""
    if isinstance(record, str):
        yield _text(record)
    elif isinstance(record, list):
        yield from filter(None, [_turns(record)])
    elif isinstance(record, Mapping):
        texts = ([_text(record[field]) for field in fields] for fields in _FIELDS if record.keys() >= set(fields))
        yield from (" ".join(some) for some in texts if None not in some)
        turns = [_turns(record[field]) for field in _TURNS if field in record]
        turns += [_exchange(record, *fields) for fields in _EXCHANGES if record.keys() >= {fields[0], fields[2]}]
        yield from (_instructed(record, some) for some in turns if some is not None)


def _text(value: Any) -> str | None:
    """A value as text, without halves of characters, which no tokenizer takes; None if it is neither text, number nor null."""
    if value is None or value != value:  # null, NaN
        return ""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value).encode(errors="replace").decode()
    return None


def _turns(value: Any) -> list[dict] | None:
    """Turns with `role` and `content`, which may also be called `from` and `value`; None if it is no list of them."""
    if value is None:
        return []
    named = isinstance(value, list) and all(isinstance(turn, Mapping) and turn.keys() & {"role", "from"} for turn in value)
    turns = [_turn(turn) for turn in value] if named else [None]
    return None if None in turns else turns


def _turn(turn: Mapping) -> dict | None:
    rest = {key: value for key, value in turn.items() if key not in ("role", "from", "content", "value")}
    role = turn.get("role") or turn.get("from")
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    if isinstance(content, list):  # of parts, of which a language model reads those of text
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        content = "".join(_text(part) or "" for part in parts)
    if not isinstance(role, str) or _text(content) is None or not turn.keys() & {"content", "value", "tool_calls"}:
        return None
    return rest | {"role": _ROLES.get(role.lower(), role.lower()), "content": _text(content)}


def _exchange(record: Mapping, asked: str, more: str | None, answered: str) -> Document | None:
    """What is asked and what is answered as turns; as a text where one of them is empty."""
    sides = _side("user", record[asked], record.get(more)), _side("assistant", record[answered])
    if None in sides:
        return None
    turns = [turn for side in sides for turn in side]
    return turns if all(plain(side).strip() for side in sides) else plain(turns)


def _side(role: str, value: Any, more: Any = None) -> list[dict] | None:
    """What one side says: turns, where they are given, or one turn of one or two texts."""
    texts = [_text(value), _text(more)]
    if None in texts:
        return _turns(value)
    return [{"role": role, "content": "\n\n".join(text for text in texts if text.strip())}]


def _instructed(record: Mapping, document: Document) -> Document:
    """Turns behind the `system` message that a record may hold beside them."""
    system = _text(record.get("system"))
    if not system or isinstance(document, str) or not document or document[0]["role"] == "system":
        return document
    return [{"role": "system", "content": system}, *document]
