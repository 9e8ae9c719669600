"""Calibration sets and the synthetic corpora, against a second implementation or by reading what was generated."""

import gzip
import itertools
import json
import random
import re

import pytest
import torch

import esparse
from esparse import corpora, synthetic


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
        assert corpora.read_documents(path) == expected, path.name


def test_math_documents_are_problem_and_solution():
    assert corpora.record_text({"problem": "Find x.", "solution": "x = 1", "level": "1"}) == "Find x. x = 1"
    assert corpora.record_text({"text": "a", "question": "b", "answer": "c"}) == "a"


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
    tested = {_numbers(item["question"]) for item in synthetic.task_items("arithmetic_problems", 300, seed=1)}
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
    from esparse import embedded
    from esparse.files import data_folder

    embedded.write_corpora(tmp_path)
    embedded.write_tasks(tmp_path)
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
    assert list(corpora.documents("c4")) == ["t"]
    assert calls[-1][1]["data_files"] == {"train": "en/c4-train.00000-of-01024.json.gz"}
    assert len(corpora.documents("math/test")) == 7
    assert {options["split"] for _, options in calls[-7:]} == {"test"}
    corpora.documents("gsm8k")
    assert calls[-1] == (("openai/gsm8k", "main"), {"split": "train"})
    with pytest.raises(ValueError, match="no split 'test'"):
        corpora.documents("c4/test")
