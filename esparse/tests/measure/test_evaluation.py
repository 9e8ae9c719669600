"""Perplexity and tasks, compared with a second implementation of the scores."""

import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import esparse
from esparse.experiments import run as runs
from esparse.files import data_folder
from esparse.measure import evaluation
from esparse.measure.evaluation import PAPER_TASKS, TINY_TASKS, resolve_tasks, task_names, task_version


def items(task):
    return [json.loads(line) for line in (data_folder() / "tasks" / f"{task}.jsonl").read_text().splitlines()]


@torch.no_grad()
def test_perplexity_is_exp_of_the_mean_loss(tiny, tiny_tokens):
    expected = sum(tiny[0](row[None], labels=row[None]).loss.item() for row in tiny_tokens) / len(tiny_tokens)
    assert esparse.perplexity(tiny[0], tiny_tokens, batch_size=5) == pytest.approx(math.exp(expected), rel=1e-5)


@torch.no_grad()
def log_likelihood(model, tokenizer, context, ending):
    ids = torch.tensor([tokenizer(context + ending).input_ids])
    start = len(tokenizer(context).input_ids)
    scores = model(ids).logits[0].log_softmax(-1)
    return sum(scores[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1]))


@pytest.mark.parametrize("task", ["web_facts", "web_reference", "arithmetic_result"])
def test_multiple_choice_takes_the_likeliest_answer(tiny, task):
    right = 0
    for item in items(task)[:25]:
        values = [log_likelihood(*tiny, item["query"], f" {choice}") for choice in item["choices"]]
        right += values.index(max(values)) == item["label"]
    row = esparse.evaluate(*tiny, [task], limit=25).loc[task]
    assert (row.metric, row["items"]) == ("acc", 25)
    assert row.value == pytest.approx(right / 25)
    share = right / 25
    assert row.stderr == pytest.approx(math.sqrt(share * (1 - share) / 24), rel=1e-6)


@torch.no_grad()
def test_generation_is_greedy_few_shot_with_exact_match(tiny):
    model, tokenizer = tiny
    shots = "".join(f"{example['query']}\n{example['answer']}\n\n" for example in items("arithmetic_problems.examples"))
    right = 0
    for item in items("arithmetic_problems")[:12]:
        ids = torch.tensor([tokenizer(f"{shots}{item['query']}").input_ids])
        text = tokenizer.decode(model.generate(ids, max_new_tokens=32, do_sample=False, pad_token_id=2)[0, ids.shape[1] :])
        found = re.search(r"#### ([0-9]+)", text.split("\n\n")[0])
        right += found is not None and found[1] == item["answer"].split("#### ")[1]
    row = esparse.evaluate(model, tokenizer, "arithmetic_problems", limit=12).loc["arithmetic_problems"]
    assert (row.metric, row.value) == ("exact_match", pytest.approx(right / 12))


def test_evaluation_sees_masks_and_skipping(tiny, tiny_trace):
    plan = esparse.search_experts(tiny_trace, 4, method="random", seed=1)
    plain = esparse.evaluate(*tiny, ["web_facts"], limit=40).value.item()
    with esparse.masked(tiny[0], plan):
        masked = esparse.evaluate(*tiny, ["web_facts"], limit=40).value.item()
    assert masked < plain == esparse.evaluate(*tiny, ["web_facts"], limit=40).value.item()


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_lm_evals_own_tasks_are_known_and_name_what_works_offline(tiny):
    with pytest.raises(ConnectionError, match="arc_easy .*offline, take tasks among web_facts"):
        esparse.evaluate(*tiny, ["arc_easy"], limit=2)


# --- lm-eval's own tasks, on items of our own in the hub's form ---------------------------------------------------------

LETTERS = ["A", "B", "C", "D"]


def hub_items(path: str, name: str | None) -> list[dict]:
    """Four items as the data set of that name holds them."""
    texts = ["one", "two", "three", "four"]
    options = {"text": texts, "label": LETTERS}
    forms = {
        "allenai/ai2_arc": lambda i: {"question": f"What is {i}?", "choices": options, "answerKey": LETTERS[i]},
        "allenai/openbookqa": lambda i: {"question_stem": f"It is {i} and", "choices": options, "answerKey": LETTERS[i]},
        "aps/super_glue": lambda i: {"passage": f"The {i}.", "question": f"is it {i}", "label": i % 2},
        "nyu-mll/glue": lambda i: {"sentence1": f"A {i}.", "sentence2": f"B {i}.", "label": i % 2},
        "Rowan/hellaswag": lambda i: {"activity_label": "Go", "ctx_a": "He", "ctx_b": "", "endings": texts, "label": f"{i}"},
        "allenai/winogrande": lambda i: {"sentence": f"She saw _: {i}.", "option1": "a", "option2": "b", "answer": "12"[i % 2]},
        "cais/mmlu": lambda i: {"question": f"What is {i}?", "choices": texts, "answer": i},
        "openai/gsm8k": lambda i: {"question": f"What is {i} + 1?", "answer": f"It is {i + 1}\n#### {i + 1}"},
        "EleutherAI/wikitext_document_level": lambda i: {"page": f"The page {i} has some words .\n" * 5},
        "EleutherAI/hendrycks_math": lambda i: {"problem": f"Find {i}.", "solution": f"It is $\\boxed{{{i}}}$."},
    }  # fmt: skip
    return [forms[path](i) for i in range(8 if path == "openai/gsm8k" else 4)]  # of GSM8K five are examples


@pytest.fixture
def hub(monkeypatch):
    """The hub's data sets, a few items each."""
    import datasets

    def load_dataset(path, name=None, **options):
        if path == "json":
            return real(path, name, **options)
        split = datasets.Dataset.from_list(hub_items(path, name))
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test", "dev"), split))

    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_the_papers_eight_tasks_in_one_call(tiny, hub):
    """Zero-shot `acc` of each, the right answer being the likeliest of the choices as the task words them."""
    table = esparse.evaluate(*tiny, "paper")
    assert [*table.index] == [*PAPER_TASKS] and set(table.metric) == {"acc"}
    assert dict(table["items"]) == {task: 4 * 57 if task == "mmlu" else 4 for task in PAPER_TASKS}
    right = {"arc_easy": 0, "boolq": 0, "winogrande": 0}
    for i in range(4):
        arc = [
            log_likelihood(*tiny, f"Question: What is {i}?\nAnswer:", f" {word}") for word in ("one", "two", "three", "four")
        ]
        right["arc_easy"] += arc.index(max(arc)) == i
        said = [log_likelihood(*tiny, f"The {i}.\nQuestion: is it {i}?\nAnswer:", f" {word}") for word in ("no", "yes")]
        right["boolq"] += said.index(max(said)) == i % 2
        seen = [log_likelihood(*tiny, f"She saw {word}", f": {i}.") for word in "ab"]
        right["winogrande"] += seen.index(max(seen)) == i % 2
    assert {task: table.value[task] for task in right} == {task: count / 4 for task, count in right.items()}


def test_gsm8k_math_and_wikitext_report_the_literatures_metrics(tiny, hub):
    domain, text = (esparse.evaluate(*tiny, suite) for suite in ("domain", "perplexity"))
    assert dict(domain.metric) == {"gsm8k": "exact_match", "hendrycks_math": "exact_match"}
    assert dict(text.metric) == {"wikitext": "word_perplexity"}
    page = hub_items("EleutherAI/wikitext_document_level", None)[0]["page"]
    assert text.value["wikitext"] > 1 and len(page.split()) > 0 and domain["items"]["hendrycks_math"] == 28


# --- the words of lm-eval's own command ---------------------------------------------------------------------------------


def test_tasks_joined_by_commas_and_suites():
    assert task_names("web_facts,web_walks") == task_names(["web_facts", " web_walks ,"]) == ["web_facts", "web_walks"]
    assert task_names(["web_walks", "tiny"]) == ["web_walks", *(task for task in TINY_TASKS if task != "web_walks")]
    assert task_names("gsm8k,domain") == ["gsm8k", "hendrycks_math"]
    assert esparse.Run(tasks="web_facts").tasks == ("web_facts",) and esparse.Run(tasks=[]).tasks == ()
    with pytest.raises(ValueError, match="No tasks are asked: take some of web_facts"):
        resolve_tasks(" , ")


def test_patterns_and_tags_stand_for_their_tasks(tiny, hub):
    assert resolve_tasks("web_*") == [task for task in TINY_TASKS if task.startswith("web_")]
    assert resolve_tasks("arithmetic_r*,web_facts,arithmetic_result") == ["arithmetic_result", "web_facts"]
    assert resolve_tasks("ai2_arc") == resolve_tasks("arc_challeng?,arc_eas[y]") == ["arc_challenge", "arc_easy"]
    table = esparse.evaluate(*tiny, "ai2_arc,web_facts", limit=4)
    assert [*table.index] == ["arc_challenge", "arc_easy", "web_facts"] and (table["items"] == 4).all()
    with pytest.raises(ValueError, match="Unknown task 'web_z\\*': take one of web_facts"):
        esparse.evaluate(*tiny, "web_z*")


def test_a_group_without_a_score_of_its_own_gives_its_tasks(tiny, hub, tmp_path, monkeypatch):
    """As one of lm-eval's whose config aggregates nothing; once computed, its rows are read again."""
    whole = evaluation._task_manager(True)
    (tmp_path / "own.yaml").write_text("group: pair\ntask:\n  - arc_easy\n  - arc_challenge\n")
    manager = type(whole)(include_path=str(tmp_path), include_defaults=False)
    manager.task_index.update({name: whole.task_index[name] for name in ("arc_easy", "arc_challenge")})
    monkeypatch.setattr(evaluation, "_task_manager", lambda everything: manager)
    table = esparse.evaluate(*tiny, "pair", limit=3)
    assert sorted(table.index) == ["arc_challenge", "arc_easy"] and (table["items"] == 3).all()
    run = esparse.Run(tasks="pair,web_facts", folder=tmp_path / "run", limit=3)
    scores = run.scores()
    assert [*scores.index[:-1]] == [*table.index] and scores.index[-1] == "web_facts"
    assert [*scores.value[:-1]] == pytest.approx([*table.value])
    monkeypatch.setattr(runs, "evaluate", lambda *_, **__: pytest.fail("computed again"))
    assert run.scores().equals(scores)


def test_a_task_that_lm_eval_cannot_make_ready_is_named(tiny, hub, monkeypatch):
    import datasets

    def broken(*_, **__):
        raise KeyError("a field\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(ValueError, match=r"^lm-eval cannot make arc_easy ready \(KeyError: .*\)\.$"):
        esparse.evaluate(*tiny, "arc_easy")


@torch.no_grad()
def test_a_config_with_output_router_logits_is_evaluated_as_without(tiny, tiny_tokens):
    """There stock `generate` fails for a padded batch, and every pass computes a balance loss that nobody asked for."""
    expected = esparse.perplexity(tiny[0], tiny_tokens), esparse.evaluate(*tiny, "arithmetic_problems,web_facts", limit=6)
    ids, mask = tiny_tokens[:2, :20], torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    tiny[0].config.output_router_logits = True
    try:
        with pytest.raises(RuntimeError):
            tiny[0].generate(ids, attention_mask=mask, max_new_tokens=3, pad_token_id=2)
        assert esparse.perplexity(tiny[0], tiny_tokens) == expected[0]
        assert esparse.evaluate(*tiny, "arithmetic_problems,web_facts", limit=6).equals(expected[1])
        assert tiny[0].config.output_router_logits is True
    finally:
        tiny[0].config.output_router_logits = False


# --- one call, one command, one library -----------------------------------------------------------------------------


def run_command(*words: str, **environment: str) -> str:
    own = os.environ | {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, cwd=data_folder().parent, env=own)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_our_numbers_are_those_of_lm_evals_own_command(tiny, tmp_path):
    tasks = ("web_facts", "arithmetic_problems")
    run_command(
        "lm_eval", "--model", "hf", "--model_args", f"pretrained={data_folder() / 'tiny'},dtype=float32,max_length=1024",
        "--tasks", ",".join(tasks), "--include_path", str(data_folder() / "tasks"), "--limit", "20", "--device", "cpu",
        "--batch_size", "64", "--output_path", str(tmp_path), "--seed", "1234",
    )  # fmt: skip
    (found,) = tmp_path.rglob("results*.json")
    theirs = json.loads(found.read_text())["results"]
    ours = esparse.evaluate(*tiny, tasks, limit=20)
    assert ours.value["web_facts"] == theirs["web_facts"]["acc,none"]
    assert ours.value["arithmetic_problems"] == theirs["arithmetic_problems"]["exact_match,strict-match"]


@pytest.mark.slow
def test_the_command_scores_plans_and_betas_and_keeps_what_it_has(tiny, tiny_trace, call, monkeypatch, tmp_path):
    plan = esparse.search_experts(tiny_trace, 6)
    plan.save(tmp_path / "plan.json")
    (tmp_path / "betas.json").write_text(json.dumps({"betas": [0.4] * 6}))
    files = ("--plan", str(tmp_path / "plan.json"), "--betas", str(tmp_path / "betas.json"), "--run-dir", str(tmp_path))
    words = ("evaluate", "tiny", "--tasks", "web_facts", "web_walks", "--limit", "16", *files)
    with esparse.masked(tiny[0], plan), esparse.skipping(tiny[0], [0.4] * 6):
        table = esparse.evaluate(*tiny, ["web_facts", "web_walks"], limit=16)
    said = call(*words).stdout
    assert f"average {100 * table.value.mean():.2f}" in said
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").iterdir()}
    assert len(kept) == 2 and call(*words).stdout == said
    monkeypatch.setenv("RANK", "1")
    again = call(*words)
    assert (again.returncode, again.stdout) == (0, "")  # of processes together the first speaks
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.slow
def test_processes_share_the_items(tiny, tmp_path):
    """As `accelerate launch` starts them on GPUs; on a CPU accelerate asks for its own word and torchrun's."""
    script = tmp_path / "shared.py"
    script.write_text("""
import atexit, json, os, pathlib, torch
import esparse
from esparse.measure import evaluation
real, found = evaluation._language_model, {"requests": []}
path = pathlib.Path(__file__).with_name(os.environ["RANK"] + ".json")  # both write to one standard output, and mix there
def told():
    path.write_text(json.dumps(found | {"ended": not torch.distributed.is_initialized()}))
atexit.register(told)  # the first registered is called last
def spy(*arguments):
    lm = real(*arguments)
    score = lm.loglikelihood
    lm.loglikelihood = lambda requests, **named: found["requests"].append(len(requests)) or score(requests, **named)
    return lm
evaluation._language_model = spy
table = esparse.evaluate(*esparse.load_model(), ["web_facts"], limit=17)
found |= {"value": table.value.item(), "items": table["items"].item()}
""")
    words = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script))
    run_command(*words, ACCELERATE_USE_CPU="true")
    value = esparse.evaluate(*tiny, ["web_facts"], limit=17).value.item()
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (found["value"], found["items"]) == (value, 17) and found["requests"][0] < 17 * 4
        assert found["ended"]  # gloo's threads, left to themselves, abort now and then


def test_an_interrupted_run_goes_on_with_the_next_task(tmp_path, monkeypatch):
    run, seen = esparse.Run(tasks=("web_facts", "web_walks"), folder=tmp_path), []
    run.limit = None  # whole tasks, which are kept one by one
    real = evaluation.evaluate

    def dies(model, tokenizer, tasks, limit, batch_size):
        seen.append(*tasks)
        if seen == ["web_facts", "web_walks"]:
            raise KeyboardInterrupt
        return real(model, tokenizer, tasks, limit=4)

    monkeypatch.setattr(runs, "evaluate", dies)
    with pytest.raises(KeyboardInterrupt):
        run.scores()
    assert [*run.scores().index] == ["web_facts", "web_walks"] and seen == ["web_facts", "web_walks", "web_walks"]
    monkeypatch.setattr(runs, "task_version", lambda task: f"another {task}" if task == "web_walks" else task_version(task))
    run.scores()
    assert seen[3:] == ["web_walks"]  # a task that has changed is asked again


@pytest.mark.slow
def test_the_offline_suite_takes_less_than_a_minute(tiny_scores):
    table, seconds = tiny_scores
    assert len(table) == 5 and (table["items"] == 100).all() and seconds < 60


def test_a_perplexity_is_no_part_of_an_average():
    values = {"value": [0.5, 7.0, 0.7], "stderr": [0.03, float("nan"), 0.04]}
    table = pd.DataFrame(
        {"metric": ["acc,none", "word_perplexity,none", "acc,none"]} | values, index=["one", "wikitext", "two"]
    )
    corpora = {"general": "web", "domain": "arithmetic"}
    run = SimpleNamespace(scores=lambda *_: table, perplexity=lambda *_: 2.0, tasks=("one", "wikitext", "two"), **corpora)
    found = esparse.Run.quality(run)
    assert found["average"] == pytest.approx(60) and found["tasks"] == {"one": 50, "two": 70}
    assert found["stderr"] == pytest.approx(2.5)
