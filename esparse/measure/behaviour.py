"""How a pruned folder behaves beside the full model: its distributions on held-out text, and what both generate."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..checkpoints.by_output import Branches, from_disk, kl
from ..checkpoints.check import Finding, inspect_folder
from ..checkpoints.models import larger_than_memory, load_model, load_tokenizer
from ..checkpoints.reader import fetch
from ..corpora import calibration_tokens, held_out
from ..files import write_json
from ..moe.layers import decoder_layers
from ..moe.running import check_tokens, evaluating, input_device, router_logits_off
from ..pruning.skipping import disable_skipping, skipping_betas
from ..tiny_model.training import PRESETS
from ..tracing.walk import BATCH, forward_head

PROMPTS, PROMPT, NEW = 16, 32, 128  # of each corpus: prompts, their tokens, and the tokens generated after each
REPEATS, LOOP = 3, 24  # a loop repeats an n-gram so often, over at least so many tokens
# A pruned model gets a warning where it is worse than this: perplexity by the full model's, KL in nats, agreement, and the
# difference of a share from the full model's.
WORSE = {"perplexity": 1.1, "KL": 0.1, "agreement": 0.9, "share": 0.05}
REQUESTS = tuple(
    f"Answer with JSON alone, without any other text: {what}"
    for what in (
        'an object with "name" and "age" of a person who is 41 and is called Ada.',
        "an array of the first five even numbers.",
        'an object with "city" and "country" for Paris.',
        'an array of two objects, each with "item" and "price".',
        'an object with "answer" set to true.',
        'an object with "colours", an array of three strings.',
        'an object with "title", "year" and "tags" of a book that you invent.',
        'an object with "error" set to null.',
    )
)
Logits = Callable[[int], Tensor]  # of the batch with this number, [sequences, length, vocabulary]


def check_folder(
    source: str | Path,
    against: str | Path | None = None,
    *,
    corpora: Sequence[str] | None = None,
    sequences: int = 16,
    length: int = 256,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    out: str | Path | None = None,
) -> list[Finding]:
    """What to know of a folder or hub id before publishing it: its files, and its behaviour beside the full model's.

        esparse.check_folder("pruned", against="tiny")

    against: the full model; without it, behaviour is left out. corpora: whose held-out documents are read (None: both
    synthetic ones for a model that ships, else C4), `sequences` of `length` tokens of each. dtype: of both models (None: the
    checkpoint's; float32 for a model that ships). Models larger than the free memory are read from disk layer by layer, and
    generate nothing. Betas that a folder is saved with are left out, as stock engines do. out: a JSON file to write.
    """
    found = inspect_folder(source, against)
    if against and any(finding.status == "fail" for finding in found):
        found.append(Finding("behaviour", "warn", "", "Not measured: what fails above comes first."))
    elif against:
        shipped = str(against) in PRESETS
        names = corpora or (("web", "arithmetic") if shipped else ("c4",))
        try:
            pair = Pair(source, against, dtype or ("float32" if shipped else None), device)
            found += pair.findings({name: pair.held_out(name, sequences, length) for name in names})
        except (ValueError, OSError) as error:
            found.append(Finding("behaviour", "fail", "", f"Not measured: {error}"))
    if out:
        write_json(out, {"folder": str(source), "against": against and str(against), "findings": [f._asdict() for f in found]})
    return found


class Pair:
    """A pruned model and the full one, in memory if both fit, else on disk."""

    def __init__(self, pruned: str | Path, full: str | Path, dtype=None, device: str | None = None):
        self.sources, self.options = (str(pruned), str(full)), {"dtype": dtype, "device": device}
        self.tokenizer = load_tokenizer(str(fetch(str(full))))
        self.streamed = larger_than_memory(*self.sources, dtype=dtype, device=device or "cpu")
        self.models = [] if self.streamed else [load_model(source, **self.options)[0] for source in self.sources]
        for model in self.models:
            if skipping_betas(model):
                disable_skipping(model)

    def held_out(self, corpus: str, sequences: int, length: int) -> Tensor:
        return calibration_tokens(held_out(corpus), self.tokenizer, sequences=sequences, length=length)

    @torch.no_grad()
    def findings(self, texts: dict[str, Tensor]) -> list[Finding]:
        """Of both models on token ids [sequences, length] by corpus."""
        batches = [batch for tokens in texts.values() for batch in tokens.split(BATCH)]
        pruned, full = (self._logits(which, batches) for which in (0, 1))
        found, start = [], 0
        for name, tokens in texts.items():
            numbers = range(start, start := start + len(tokens.split(BATCH)))
            found += _compared(name, distances(batches, numbers, pruned, full))
        return found + (self._left_out() if self.streamed else self._generated(texts))

    def _logits(self, which: int, batches: Sequence[Tensor]) -> Logits:
        if not self.streamed:
            return partial(_forward, self.models[which], batches)
        model, loaded = from_disk(self.sources[which], **self.options)
        check_tokens(model, torch.cat([batch.flatten() for batch in batches])[None])
        batches = [batch.to(input_device(model)) for batch in batches]
        walked, stream = Branches(model, loaded, batches), [()] * len(batches)
        for number in range(len(decoder_layers(model))):
            (stream,) = walked.forward(number, [stream], [None])
        return lambda b: forward_head(model, batches[b], stream[b])

    def _left_out(self) -> list[Finding]:
        why = "Left out: these models are larger than the free memory and are read from disk layer by layer."
        return [Finding(name, "warn", "", why) for name in ("continuations", "loops", "JSON replies")]

    def _generated(self, texts: dict[str, Tensor]) -> list[Finding]:
        prompts = torch.cat([tokens[:PROMPTS, :PROMPT] for tokens in texts.values()])
        pruned, full = ([text for ids in prompts.split(BATCH) for text in generate(model, ids)] for model in self.models)
        same = [_same(*pair) / max(1, len(pair[1])) for pair in zip(pruned, full, strict=True)]
        ends = ends_of(self.models[1])
        value = {"pruned": _share(loops(t, ends) for t in pruned), "full": _share(loops(t, ends) for t in full)}
        found = [
            Finding("continuations", "ok", sum(same) / len(same), "The part of a text generated greedily before both differ."),
            _share_finding("loops", value, value["pruned"] - value["full"], "texts that end in a loop"),
        ]
        return found + (self._replies() if self.tokenizer.chat_template else [])

    def _replies(self) -> list[Finding]:
        """Whether replies to requests for JSON are JSON, and come to an end."""
        ends, valid, ended = ends_of(self.models[1]), {}, {}
        for name, model in zip(("pruned", "full"), self.models, strict=True):
            replies = [generate(model, self._request(request))[0] for request in REQUESTS]
            valid[name] = _share(is_json(self.tokenizer.decode(reply, skip_special_tokens=True)) for reply in replies)
            ended[name] = _share(reply[-1] in ends for reply in replies)
        return [
            _share_finding(name, value, value["full"] - value["pruned"], what)
            for name, value, what in (("JSON replies", valid, "replies that are JSON"), ("ended", ended, "replies that end"))
        ]

    def _request(self, text: str) -> Tensor:
        talk, options = [{"role": "user", "content": text}], {"add_generation_prompt": True, "return_dict": False}
        return torch.tensor([self.tokenizer.apply_chat_template(talk, **options)])


def _forward(model, batches: Sequence[Tensor], b: int) -> Tensor:
    with evaluating(model), router_logits_off(model):
        return model(batches[b].to(input_device(model)), use_cache=False).logits


def distances(batches: Sequence[Tensor], numbers: Sequence[int], pruned: Logits, full: Logits) -> dict[str, float]:
    """Both perplexities on these batches; the mean over tokens of the KL from the full model's distribution of the next token
    to the pruned one's, in nats; and the share of tokens after which both find the same token likeliest."""
    nll, divergence, same, count, predicted = torch.zeros(2, dtype=torch.float64), 0.0, 0, 0, 0
    for b in numbers:
        expected = full(b).float().log_softmax(-1)
        found, ids = pruned(b).to(expected.device).float().log_softmax(-1), batches[b].to(expected.device)
        divergence += kl(expected, found).item()
        same += (expected.argmax(-1) == found.argmax(-1)).sum().item()
        targets = [-scores[:, :-1].gather(-1, ids[:, 1:, None]).double().sum().item() for scores in (found, expected)]
        nll += torch.tensor(targets, dtype=torch.float64)
        count, predicted = count + ids.numel(), predicted + ids[:, 1:].numel()
    perplexities = dict(zip(("pruned", "full"), (nll / predicted).exp().tolist(), strict=True))
    return {"perplexity": perplexities, "KL": divergence / count, "agreement": same / count}


def _compared(corpus: str, found: dict) -> list[Finding]:
    ratio = found["perplexity"]["pruned"] / found["perplexity"]["full"]
    status = {"perplexity": ratio <= WORSE["perplexity"], "KL": found["KL"] <= WORSE["KL"]}
    status["agreement"] = found["agreement"] >= WORSE["agreement"]
    notes = {
        "perplexity": f"{ratio:.3f} times the full model's, on held-out text.",
        "KL": "In nats a token, from the full model's next-token distribution.",
        "agreement": "The share of tokens after which both models' likeliest next token is the same.",
    }
    judged = lambda name: "ok" if status[name] else "warn" if ratio == ratio else "fail"  # noqa: E731
    return [Finding(f"{name}, {corpus}", judged(name), found[name], notes[name]) for name in notes]


def ends_of(model) -> set[int]:
    """The ids after which a text ends."""
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [] if ends is None else [ends])


def generate(model, ids: Tensor, new: int = NEW) -> list[list[int]]:
    """The greedy continuation of each prompt [prompts, length], up to and with the id that ends it."""
    ends = ends_of(model)
    config = GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=[*ends] or None, pad_token_id=min(ends, default=0)
    )
    ids = ids.to(input_device(model))
    with evaluating(model), router_logits_off(model):
        texts = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[:, ids.shape[1] :].tolist()
    stops = [next((i + 1 for i, token in enumerate(text) if token in ends), len(text)) for text in texts]
    return [text[:stop] for text, stop in zip(texts, stops, strict=True)]


def loops(text: Sequence[int], ends: set[int] = frozenset()) -> bool:
    """Whether a text of token ids runs in a circle: one n-gram fills its last part, `REPEATS` times or more and over `LOOP`
    tokens or more. A text that comes to an end (`ends`) does not."""
    if text and text[-1] in ends:
        return False
    spans = ((period, max(REPEATS * period, LOOP)) for period in range(1, len(text) // REPEATS + 1))
    return any(span <= len(text) and text[-span + period :] == text[-span:-period] for period, span in spans)


def is_json(reply: str) -> bool:
    """Whether a reply is a JSON object or array, alone or in a Markdown fence."""
    text = reply.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    try:
        return isinstance(json.loads(text), dict | list)
    except ValueError:
        return False


def _same(one: Sequence[int], other: Sequence[int]) -> int:
    """The tokens before two texts first differ."""
    return next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other)))


def _share(found) -> float:
    found = list(found)
    return sum(found) / len(found)


def _share_finding(name: str, value: dict[str, float], worse: float, what: str) -> Finding:
    return Finding(name, "warn" if worse > WORSE["share"] else "ok", value, f"The share of {what}.")
