"""Perplexity and tasks against scorers written down again."""

import json
import math
import re

import pytest
import torch

import esparse
from esparse.files import data_folder


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


@pytest.mark.parametrize("task", ["web_facts", "web_yes_no", "arithmetic_result"])
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
    shots = "".join(f"Question: {e['question']}\nAnswer:\n{e['answer']}\n\n" for e in items("arithmetic_problems.examples"))
    right = 0
    for item in items("arithmetic_problems")[:12]:
        ids = torch.tensor([tokenizer(f"{shots}Question: {item['question']}\nAnswer:").input_ids])
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


def test_lm_evals_own_tasks_are_known_and_name_what_works_offline(tiny):
    with pytest.raises(ConnectionError, match="arc_easy .*offline, take tasks among web_facts"):
        esparse.evaluate(*tiny, ["arc_easy"], limit=2)
