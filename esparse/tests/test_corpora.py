"""Calibration sets and the synthetic corpora, checked by a second implementation or by reading the generated text."""

import copy
import gzip
import itertools
import json
import random
import re

import pytest
import torch

import esparse
from esparse import corpora
from esparse.documents import read_documents, to_document
from esparse.tiny_model import build, synthetic


def paper_protocol(texts, encode, sequences, length, seed):
    """A.7 written down again: shuffle, 16 documents a sequence, batches of 1,000, remainders dropped."""
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    packed, stream = [], []
    for count, number in enumerate(order[: 16 * sequences], 1):
        stream += encode(texts[number])
        if count % 1000 == 0:
            packed += [stream[i : i + length] for i in range(0, len(stream) // length * length, length)]
            stream = []
    packed += [stream[i : i + length] for i in range(0, len(stream) // length * length, length)]
    return torch.tensor(packed[:sequences])


def test_of_a_file_every_fifth_document_is_held_out(tiny, tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("\n\n".join(f"Document {i} is about {i * 7919 % 1000} things. " * 8 for i in range(400)))
    whole, rest, held_out = (set(corpora.documents(name)) for name in (str(path), f"{path}/rest", f"{path}/heldout"))
    assert rest | held_out == whole and not rest & held_out and 60 < len(held_out) < 100
    run = esparse.Run(general=str(path), domain="arithmetic", sequences=8, length=64, folder=tmp_path)
    said = lambda tokens: set(re.findall(r"Document (\d+) is", " ".join(tiny[1].batch_decode(tokens))))  # noqa: E731
    mine, others = said(run.tokens(f"{path}+arithmetic")) | said(run.tokens(str(path), seed=7)), said(run.held_out(str(path)))
    assert mine and others and not mine & others


def test_packing_is_the_papers(tiny, tmp_path):
    texts = [" ".join(["word"] * (i % 7 + 1)) + f" {i}" for i in range(1500)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    ours = esparse.calibration_tokens(str(path), tiny[1], sequences=80, length=64, seed=3)
    expected = paper_protocol(texts, lambda text: tiny[1](text).input_ids, 80, 64, 3)
    assert ours.dtype == torch.int64 and torch.equal(ours, expected)
    assert (ours == tiny[1].bos_token_id).sum() > 80  # every document begins with BOS
    assert not torch.equal(ours, esparse.calibration_tokens(str(path), tiny[1], sequences=80, length=64, seed=4))


def test_formats_hold_the_same_documents(tmp_path):
    records = [{"question": "One?", "answer": "Two.\u2028Three."}, {"question": "Four?", "answer": "Five."}]
    expected = ["One? Two.\u2028Three.", "Four? Five."]
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "b.json").write_text(lines)
    for name, text in (("a.jsonl.gz", lines), ("a.json.gz", json.dumps(records))):
        with gzip.open(tmp_path / name, "wt", encoding="utf-8") as file:
            file.write(text)
    (tmp_path / "a.txt").write_text("\n\n".join(expected))
    for path in tmp_path.iterdir():
        assert read_documents(path) == expected, path.name


def test_math_documents_are_problem_and_solution():
    assert to_document({"problem": "Find x.", "solution": "x = 1", "level": "1"}) == "Find x. x = 1"
    assert to_document({"text": "a", "question": "b", "answer": "c"}) == "a"


RECORDS = [{"text": "Grüße.", "score": float("nan")}, {"text": "Two\nlines."}]
LAID_OUT = {
    "one a line": "\n".join(map(json.dumps, RECORDS)),
    "over lines": "\n\n".join(json.dumps(record, indent=4) for record in RECORDS),
    "a list": json.dumps(RECORDS, indent=1),
    "a list in an object": json.dumps({"version": 1, "data": RECORDS}, indent=1),
    "strings": json.dumps([record["text"] for record in RECORDS]),
    "a column": json.dumps({"text": [record["text"] for record in RECORDS]}),
}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_documents_are_the_same_whoever_wrote_the_file(tmp_path, end, mark):
    """With or without a byte-order mark, by any line end, packed or not whatever it is called, JSON laid out by any tool."""
    texts = [record["text"] for record in RECORDS]
    written = [(f"{i}.{suffix}", text) for i, text in enumerate(LAID_OUT.values()) for suffix in ("json", "JSONL", "ndjson")]
    written += [("a.txt", "\n\n".join(texts)), ("a.TXT", "\n\n".join(texts) + "\n")]
    written += [("a.csv", 'id,text\n1,Grüße.\n2,"Two\nlines."\n'), ("a.tsv", 'id\ttext\n1\tGrüße.\n2\t"Two\nlines."\n')]
    for name, text in written:
        content = mark + text.replace("\n", end).encode()
        for suffix, packed in (("", content), (".gz", gzip.compress(content)), (".gz", content)):
            (tmp_path / f"{name}{suffix}").write_bytes(packed)
            assert read_documents(tmp_path / f"{name}{suffix}") == texts, (name, suffix)


def test_tables_hold_records_too(tmp_path):
    import datasets

    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    table = datasets.Dataset.from_list([{"messages": turns, "text": None}, {"messages": None, "text": "One."}])
    table.to_parquet(tmp_path / "some.parquet")
    table.save_to_disk(tmp_path / "saved")  # with files of JSON beside it that hold no records
    assert (tmp_path / "saved" / "state.json").exists()
    assert read_documents(tmp_path / "some.parquet") == read_documents(tmp_path / "saved") == [turns, "One."]
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "some.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match="cut.parquet cannot be read .*: it may be truncated"):
        read_documents(tmp_path / "cut.parquet")
    (tmp_path / "ragged.csv").write_text("text\nHello, world\n")
    with pytest.raises(ValueError, match="ragged.csv, line 2 has more fields than the first line names"):
        read_documents(tmp_path / "ragged.csv")


def test_without_pyarrow_a_table_ends_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "some.parquet").touch()
    with pytest.raises(ImportError, match="some.parquet needs pyarrow: pip install pyarrow"):
        read_documents(tmp_path / "some.parquet")


def test_records_without_text_are_left_out(tmp_path):
    lines = ["", None, " \n"]
    records = [{"text": text} for text in lines] + [{"text": None, "content": "f()"}, {"question": "6 x 7?", "answer": 42}]
    records += [
        {"messages": []},
        {"conversations": None},
        {"text": "half \ud83d a face"},
        {"instruction": "", "output": "All."},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert read_documents(tmp_path / "a.jsonl") == ["f()", "6 x 7? 42", "half ? a face", "All."]
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": None}))
    with pytest.raises(ValueError, match="b.jsonl is empty: it has 0 tokens"):
        read_documents(tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "a"}\n{"title": "b", "tags": ["c"]}', "line 2 has neither 'text' .* it has the keys title, tags; known"),
        (
            '[{"text": "a"}, {"problem": "b"}]',
            "entry 2 has neither 'text' .* the keys problem; known are text in text, problem and sol",
        ),
        ('{"title": "b", "tags": ["c"]}', "line 1 has neither 'text' .* the keys title, tags"),
        ('{"train": [{"text": "a"}], "test": [{"text": "b"}]}', "line 1 has neither .* the keys train, test; "),
        (
            '{"messages": [{"speaker": "a", "says": "b"}]}',
            "entry 1 has neither .* the keys speaker, says; .*turns of role and content in messages, conv",
        ),
        ('{"text": ["a", 1]}\n{"text": "b"}', "line 1 has neither"),
        ("[1, 2]\n3", "line 1 has neither 'text' .*: it has no keys"),
        ('{"text": "a"}\n\n{"text":\n "b"', r"line 3 is not valid JSON \(Expecting ',' delimiter: line 4"),
        ('{"text": "a"},\n{"text": "b"}', "line 1 is not valid JSON"),
    ],
)
def test_what_is_no_record_is_named(tmp_path, content, said):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=f"a.json, {said}"):
        read_documents(tmp_path / "a.json")


def test_the_tree_of_math_is_a_corpus(tiny, tmp_path):
    train, expected = tmp_path / "MATH" / "train", []
    for subject in ("algebra", "number_theory"):
        (train / subject).mkdir(parents=True)
        for i in range(20):
            record = {"problem": f"What is {i} + 1? " * 9, "level": "Level 1", "type": subject, "solution": f"It is ${i + 1}$."}
            (train / subject / f"{i}.json").write_text(json.dumps(record, indent=4))
            expected.append((f"{subject}/{i}.json", record["problem"] + " " + record["solution"]))
    texts = [text for _, text in sorted(expected)]
    (train / ".cache").mkdir()
    for hidden in ("README.md", ".cache/1.json", "._1.json", "dataset_infos.json"):
        (train / hidden).write_text("not a record")
    assert read_documents(train) == texts
    tokens = esparse.calibration_tokens(f"{train}/", tiny[1], sequences=6, length=64)
    assert torch.equal(tokens, paper_protocol(texts, lambda text: tiny[1](text).input_ids, 6, 64, 42))
    rest, held_out = (corpora.documents(f"{train}/{part}") for part in ("rest", "heldout"))
    assert sorted(rest + held_out) == sorted(texts) and 0 < len(held_out) < len(rest)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="The folder .*empty holds no file that is .txt"):
        read_documents(tmp_path / "empty")


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('No ' + m.role) }}"
    "{% elif (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
)
TALK = [{"role": "user", "content": "Ada keeps a goat."}, {"role": "assistant", "content": "Where?"}]
CHATS = [
    ({"messages": TALK, "id": 1}, TALK),
    (TALK, TALK),
    (
        {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}, {"type": "image"}]} for turn in TALK]},
        TALK,
    ),
    ({"conversations": [{"from": "human", "value": TALK[0]["content"]}, {"from": "gpt", "value": "Where?"}]}, TALK),
    (  # as Parquet gives rows of two kinds back
        {
            "conversations": [
                {"role": None, "content": None, "from": "USER", "value": TALK[0]["content"]},
                TALK[1] | {"from": None},
            ]
        },
        TALK,
    ),
    ({"instruction": "Ada keeps a goat.", "input": "", "output": "Where?"}, TALK),
    ({"prompt": "Ada keeps a goat.", "completion": "Where?"}, TALK),
    ({"prompt": TALK[:1], "completion": TALK[1:]}, TALK),
    ({"prompt": "Ada keeps a goat.", "response": "Where?"}, TALK),
    (
        {"instruction": "Add.", "context": "1, 2", "response": "3"},
        [{"role": "user", "content": "Add.\n\n1, 2"}, {"role": "assistant", "content": "3"}],
    ),
]


@pytest.mark.parametrize(("record", "turns"), CHATS)
def test_chats_go_through_the_template(tiny, tmp_path, record, turns):
    chatty = copy.deepcopy(tiny[1])
    chatty.chat_template = TEMPLATE
    (tmp_path / "chats.json").write_text(json.dumps([record] * 40))
    ours = esparse.calibration_tokens(str(tmp_path / "chats.json"), chatty, sequences=2, length=32)
    by_hand = chatty.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert by_hand.count(chatty.bos_token_id) == 1 and torch.equal(
        ours, paper_protocol([turns] * 40, lambda _: by_hand, 2, 32, 42)
    )
    plainly = esparse.calibration_tokens(str(tmp_path / "chats.json"), tiny[1], sequences=2, length=32)
    by_hand = tiny[1](turns[0]["content"] + "\n\n" + turns[1]["content"]).input_ids
    assert torch.equal(plainly, paper_protocol([turns] * 40, lambda _: by_hand, 2, 32, 42))


def test_roles_that_a_template_refuses_are_told_to_it_otherwise(tiny, tmp_path):
    said = [
        ("assistant", "Well."),
        ("system", "Be brief."),
        ("user", "Who?"),
        ("tool", "Ada."),
        ("gpt", "Ada"),
        ("gpt", "does."),
    ]
    record = {"conversations": [{"from": role, "value": text} for role, text in said]}
    chatty = copy.deepcopy(tiny[1])
    chatty.chat_template = TEMPLATE.replace("not in ['user', 'assistant']", "== 'nobody'").replace(
        "loop.index0 % 2 == 0", "m.role == 'user'"
    )
    turns = to_document(record)
    assert corpora._ids(chatty, turns) == chatty.apply_chat_template(turns, return_dict=False)  # taken as they are
    assert [turn["role"] for turn in turns] == ["assistant", "system", "user", "tool", "assistant", "assistant"]
    chatty.chat_template = TEMPLATE
    text = "<s>[user] Be brief.\n\nWho?\n\nAda.</s>[assistant] Ada\n\ndoes.</s>"
    assert corpora._ids(chatty, turns) == chatty(text, add_special_tokens=False).input_ids
    with pytest.raises(ValueError, match=r"refuses \(Roles must alternate\) the conversation of assistant that begins 'Well.'"):
        corpora._ids(chatty, to_document([{"role": "assistant", "content": "Well."}]))


def test_what_the_system_says_comes_first():
    system = {"role": "system", "content": "Be brief."}
    assert (
        to_document({"system": "Be brief.", "messages": TALK}) == [system, *TALK] == to_document({"messages": [system, *TALK]})
    )
    assert to_document({"system": "", "messages": TALK}) == TALK


def test_weights_say_how_many_sequences_take_turns(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("c+.txt", "b*2.txt", "a.txt"):
        (tmp_path / name).write_text("\n\n".join(f"{name[0]}{name[0]} {i}." for i in range(400)))
    draw = lambda corpus, n: esparse.calibration_tokens(corpus, tiny[1], sequences=n, length=16)  # noqa: E731
    mixed = draw("c+.txt*3+b*2.txt+a.txt*2", 14)
    alone = {name: iter(draw(name, n)) for name, n in (("c+.txt", 9), ("b*2.txt", 3), ("a.txt", 6))}
    order = [name for name, n in (("c+.txt", 3), ("b*2.txt", 1), ("a.txt", 2)) for _ in range(n)]
    assert torch.equal(mixed, torch.stack([next(alone[name]) for name in (order * 3)[:14]]))
    assert torch.equal(draw(" a.txt * 3+ c+.txt ", 4), draw("a.txt*3+c+.txt", 4))
    assert torch.equal(draw("c+.txt*3", 5), draw("c+.txt", 5)) and torch.equal(
        draw("web*1+arithmetic", 5), draw("web+arithmetic", 5)
    )
    for bad in ("web*0+arithmetic", "web*x", "web*1.5+arithmetic", "web*", "*2", "web+", "", "web*-1"):
        with pytest.raises(ValueError, match=f"^{re.escape(repr(bad))} is no corpus: a weight is a whole number from 1 on"):
            draw(bad, 2)


def test_a_run_mixes_and_holds_out_folders(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("one/c4", "other/c4"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(100):
            (tmp_path / folder / f"{i}.txt").write_text(f"{folder[:3].title()} {i}. " * 20)
    run = esparse.Run(general="one/c4", domain="other/c4*2+web", sequences=6, length=64, folder=tmp_path / "run")
    said = lambda tokens: set(re.findall(r"(?:One|Oth) \d+\.", " ".join(tiny[1].batch_decode(tokens))))  # noqa: E731
    for corpus in (run.general, run.domain):
        mine, others = said(run.tokens(corpus)), said(run.held_out(corpus))
        assert mine and others and not mine & others
    assert torch.equal(
        run.held_out(run.domain)[2::3], esparse.calibration_tokens("web/heldout", tiny[1], sequences=2, length=64, seed=43)
    )
    assert run.label(run.domain) == "2 x c4 and web" and run.label("one/c4") == "c4"
    alike = esparse.Run(general="one/c4", domain="other/c4", folder=tmp_path / "run")
    assert [alike.label(alike.general), alike.label(alike.domain)] == ["one/c4", "other/c4"]
    (tmp_path / "one" / "c4" / "rest").mkdir()
    with pytest.raises(ValueError, match="one/c4 holds 'rest', but a run uses this name"):
        run.tokens("one/c4+web")
    monkeypatch.chdir(tmp_path / "other")  # what is there goes before what the hub has
    assert len(corpora.documents("c4")) == 100 == len(corpora.documents("c4/rest")) + len(corpora.documents("c4/heldout"))


def test_splits_differ_and_calibration_is_repeatable(tiny):
    one = esparse.calibration_tokens("web", tiny[1], sequences=8, length=64)
    assert torch.equal(one, esparse.calibration_tokens("web", tiny[1], sequences=8, length=64))
    assert not torch.equal(one, esparse.calibration_tokens("web/heldout", tiny[1], sequences=8, length=64))


EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def _numbers(text):
    return tuple(sorted(int(number) for number in re.findall(r"\d+", text)))


def test_no_training_document_uses_a_held_out_tuple():
    """Read back 6,000 documents of the training seed: questions and sums share no tuple with the test items."""
    trained = set()
    for name in ("web", "arithmetic"):
        for document in itertools.islice(synthetic.documents(name, seed=0), 3000):
            for question in re.findall(r"Question: (.*\d.*)", document):
                trained.add(_numbers(question))
            for a, sign, b, _ in EQUATION.findall(document):
                if sign in "+-":
                    trained.add(tuple(sorted((int(a), int(b)))))
    tested = {_numbers(item["query"]) for item in synthetic.task_items("arithmetic_problems", 300, seed=1)}
    assert len(trained) > 3000 and len(tested) > 200
    assert not trained & tested
    held_out = {_numbers(item["query"].split("\n")[0]) for item in synthetic.task_items("arithmetic_result", 300, seed=1)}
    assert not trained & held_out


def test_every_worked_step_is_right_and_ends_in_the_answer():
    for document in itertools.islice(synthetic.documents("arithmetic", seed=5), 500):
        for a, sign, b, result in EQUATION.findall(document):
            assert eval(f"{a} {sign} {b}".replace("/", "//")) == int(result)
        for block in re.findall(r"Answer:\n(.*?)\n#### (\d+)", document, flags=re.S):
            assert block[0].rsplit("= ", 1)[1] == block[1]


def test_facts_of_the_tasks_are_told_but_never_asked_openly():
    items = synthetic.task_items("web_facts", 300, seed=1)
    asked = {
        match
        for d in itertools.islice(synthetic.documents("web", 0), 5000)
        for match in re.findall(r"Question: .*\?\nAnswer: \w+", d)
    }
    assert len(asked) > 100
    for item in items:
        assert f"{item['query']} {item['choices'][item['label']]}" not in asked


def test_tasks_are_balanced_and_their_items_differ():
    for task in synthetic.TASKS:
        items = synthetic.task_items(task, 300, seed=1)
        assert len({json.dumps(item) for item in items}) == 300
        if "choices" in items[0]:
            width = len(items[0]["choices"])
            labels = [item["label"] for item in items]
            assert all(abs(labels.count(i) / 300 - 1 / width) < 0.12 for i in range(width)), task
            assert all(len(set(item["choices"])) == width for item in items)


def test_the_shipped_corpora_and_tasks_are_what_the_code_makes(tmp_path):
    from esparse.files import data_folder

    build.write_corpora(tmp_path)
    build.write_tasks(tmp_path)
    for made in [path for path in tmp_path.rglob("*") if path.is_file()]:
        shipped = data_folder() / made.relative_to(tmp_path)
        read = (lambda p: gzip.decompress(p.read_bytes())) if made.suffix == ".gz" else (lambda p: p.read_bytes())
        assert read(made) == read(shipped), made.name


def test_hub_corpora_are_asked_for_by_their_names(monkeypatch):
    """What would be fetched, with the fetching replaced: the paper's C4 shard, all of MATH, GSM8K."""
    import datasets

    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return datasets.Dataset.from_list([{"text": "t", "problem": "p", "solution": "s", "question": "q", "answer": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [to_document(record) for record in corpora.documents("c4")] == ["t"]
    assert calls[-1][1]["data_files"] == {"train": "en/c4-train.00000-of-01024.json.gz"}
    assert len(corpora.documents("math/test")) == 7
    assert {options["split"] for _, options in calls[-7:]} == {"test"}
    corpora.documents("gsm8k")
    assert calls[-1] == (("openai/gsm8k", "main"), {"split": "train"})
    with pytest.raises(ValueError, match="no split 'test'"):
        corpora.documents("c4/test")
