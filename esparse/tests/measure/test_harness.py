"""Beginnings that items share run once, and no score changes: against each item alone, without padding and cache."""

import pytest
import torch

from esparse.measure.harness import HarnessModel, shares_beginnings
from esparse.tests.conftest import apart, sampled
from esparse.tests.families import FAMILIES, family_model

# Attention of several kinds (windows, latent), and families whose models keep a state.
SHARING = ("mixtral", "deepseek_v3", "gpt_oss", "gemma4_text", "mimo_v2_flash")
STATEFUL = ("qwen3_next", "lfm2_moe", "nemotron_h")
LENGTHS = {12: (3, 1, 5), 7: (2, 2), 8: (4,), 20: (1, 1, 1), 3: (6, 2)}  # of contexts, and of their continuations
NEW = 6


DRAWN = torch.randint(3, 60, (200,), generator=torch.Generator().manual_seed(0)).tolist()


def row(length: int) -> list[int]:
    """The next tokens of a random sequence, which starts again where it ends."""
    DRAWN.extend(taken := [DRAWN.pop(0) for _ in range(length)])
    return taken


@pytest.fixture
def harness(tiny):
    def made(model, batch_size: int = 2) -> HarnessModel:
        return HarnessModel(pretrained=model.eval(), tokenizer=tiny[1], batch_size=batch_size)

    return made


@pytest.fixture
def requests():
    contexts = {length: row(length) for length in LENGTHS}
    return [(None, context, row(more)) for length, context in contexts.items() for more in LENGTHS[length]]


class Counter:
    """The number of tokens that a model runs."""

    def __init__(self, model):
        self.tokens = 0
        model.get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, _module, inputs) -> None:
        self.tokens += inputs[0].numel()


@torch.no_grad()
def alone(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    logs = model(torch.tensor([context + continuation]), use_cache=False).logits[0, len(context) - 1 : -1].log_softmax(1)
    return logs.gather(1, torch.tensor(continuation)[:, None]).sum().item(), logs.argmax(1).tolist() == continuation


@pytest.mark.parametrize("family", sampled(FAMILIES, SHARING + STATEFUL))
def test_likelihoods_are_those_of_every_item_alone(harness, requests, family):
    model = family_model(family).double()
    found = torch.tensor(harness(model)._loglikelihood_tokens(requests, disable_tqdm=True), dtype=torch.float64)
    expected = torch.tensor([alone(model, *both) for _, *both in requests], dtype=torch.float64)
    assert apart(found[:, 0], expected[:, 0]) < 1e-5 and torch.equal(found[:, 1], expected[:, 1])


@pytest.mark.parametrize("family", SHARING)
@pytest.mark.parametrize("beginning", [0, 9])
def test_continuations_are_those_of_every_prompt_alone(harness, family, beginning):
    model, start = family_model(family).double(), row(beginning)
    prompts, options = [start + row(more) for more in (4, 9, 1)], {"do_sample": False, "eos_token_id": None}
    pads = [max(map(len, prompts)) - len(prompt) for prompt in prompts]
    context, mask = (
        torch.tensor([[0] * pad + row for pad, row in zip(pads, rows, strict=True)])
        for rows in (prompts, [[1] * len(prompt) for prompt in prompts])
    )
    length = context.shape[1]
    found = harness(model)._model_generate(context, length + NEW, [], attention_mask=mask, **options)
    assert torch.equal(found[:, :length], context)
    for prompt, taken in zip(prompts, found[:, length:].tolist(), strict=True):
        one = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, use_cache=False, pad_token_id=2, **options)
        assert one[0, len(prompt) :].tolist() == taken


def test_a_shared_beginning_runs_once(harness, requests, tiny):
    model = family_model("mixtral")
    lm, counter = harness(model, batch_size=100), Counter(model)
    lm._loglikelihood_tokens(requests, disable_tqdm=True)
    rows = sum(map(len, LENGTHS.values()))
    assert counter.tokens == len(LENGTHS) * max(LENGTHS) + rows * (max(map(max, LENGTHS.values())) - 1)
    counter.tokens, start = 0, row(9)
    prompts = torch.tensor([start + row(4) for _ in range(5)])
    lm._model_generate(prompts, 13 + NEW, [], attention_mask=torch.ones_like(prompts), eos_token_id=None)
    assert counter.tokens == 9 + 5 * 4 + 5 * (NEW - 1)


def test_who_keeps_more_than_keys_and_values_reads_every_item_from_its_beginning():
    assert [name for name in SHARING + STATEFUL if shares_beginnings(family_model(name))] == [*SHARING]


def test_a_window_shorter_than_the_prompts_counts_no_padding(harness):
    model = family_model("mixtral", sliding_window=8).double()
    lm, counter, start = harness(model), Counter(model), row(9)
    prompts = torch.tensor([start + row(4) for _ in range(3)])
    found = lm._model_generate(prompts, 13 + NEW, [], attention_mask=torch.ones_like(prompts), eos_token_id=None)
    assert counter.tokens == 3 * 13 + 3 * (NEW - 1)
    plain = model.generate(prompts, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=2)
    assert torch.equal(found, plain)
