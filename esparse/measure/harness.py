"""lm-eval's Hugging Face model, but what several texts begin with is run once: few-shot examples, and the context of an item's
choices. This module imports lm-eval, so `evaluation` imports it only when it scores."""

from collections.abc import Sequence
from itertools import takewhile
from weakref import WeakKeyDictionary

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

ENCODED: WeakKeyDictionary = WeakKeyDictionary()  # by tokenizer: the tokens of strings, which are the same for every plan


def shares_beginnings(model) -> bool:
    """Whether a cache of keys and values is all that the model keeps of the tokens before: one with a state (Mamba, linear
    attention, convolutions) would have read the padding, too."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    return not model._is_stateful and kinds <= {"full_attention", "sliding_attention"}


class HarnessModel(HFLM):
    """Scores as HFLM does, up to rounding. Caches of shared beginnings take the memory of the rows that HFLM would run."""

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, left_truncate_len=None, **kwargs) -> list[int]:
        known = ENCODED.setdefault(self.tokenizer, {})
        key = string, add_special_tokens, left_truncate_len, self.add_bos_token
        if key not in known:
            known[key] = super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)
        return list(known[key])

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs=None) -> list[tuple[float, bool]]:
        groups: dict[tuple[int, ...], list[int]] = {}  # context: the requests that begin with it
        for at, (_, context, _) in enumerate(requests):
            groups.setdefault(tuple(context), []).append(at)
        longest = max((len(context) + len(continuation) for _, context, continuation in requests), default=0)
        if len(groups) == len(requests) or longest > self.max_length + 1 or not shares_beginnings(self.model):
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        parts = [(context, some) for context in sorted(groups, key=len) for some in _split(groups[context], self.batch_size)]
        answers, batch = {}, []
        while parts:
            batch.append(parts.pop())
            if not parts or sum(len(some) for _, some in (*batch, parts[-1])) > self.batch_size:
                answers |= self._answers(batch, requests)
                batch = []
        return [answers[at] for at in range(len(requests))]

    def _answers(self, batch: Sequence[tuple[tuple, list[int]]], requests) -> dict[int, tuple[float, bool]]:
        """For each request the log-likelihood of its continuation, and whether greedy decoding would take it. batch: contexts
        with the numbers of the requests that begin with them."""
        order = [at for _, some in batch for at in some]
        # On a CPU: from there it also selects rows of caches that lie on several devices.
        of = torch.tensor([number for number, (_, some) in enumerate(batch) for _ in some])
        targets, real = self._padded([requests[at][2] for at in order], "right")  # [rows, longest continuation]
        logits = self._continued(self._padded([context for context, _ in batch], "left"), of, targets[:, :-1], real[:, :-1])
        logs = torch.log_softmax(logits, 2, dtype=self.softmax_dtype)
        sums = (logs.gather(2, targets[:, :, None])[:, :, 0] * real).sum(1).tolist()
        greedy = ((logs.argmax(2) == targets) | ~real).all(1).tolist()
        return dict(zip(order, zip(sums, greedy, strict=True), strict=True))

    @torch.no_grad()
    def _continued(self, contexts: tuple[Tensor, Tensor], of: Tensor, rest: Tensor, real: Tensor) -> Tensor:
        """Logits [rows, 1 + length, vocabulary] after the last token of context `of`, and after each token of `rest` behind
        it."""
        tokens, mask = contexts
        run = self.model(tokens, attention_mask=mask.long(), position_ids=_positions(mask), use_cache=True, logits_to_keep=1)
        first, cache = run.logits[of], run.past_key_values
        if rest.shape[1] == 0:
            return first
        cache.batch_select_indices(of)
        mask = torch.cat([mask[of], real], 1)
        positions = _positions(mask)[:, -rest.shape[1] :]
        run = self.model(rest, attention_mask=mask.long(), position_ids=positions, past_key_values=cache)
        return torch.cat([first, run.logits], 1)

    def _padded(self, rows: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
        """Token rows of several lengths, padded with zeros, and where they are real."""
        parts = [torch.tensor(row, device=self.device) for row in rows]
        real = [torch.ones_like(part, dtype=torch.bool) for part in parts]
        return tuple(pad_sequence(some, batch_first=True, padding_side=side) for some in (parts, real))

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], attention_mask: Tensor, **options) -> Tensor:
        """Continues prompts that are padded on the left. What all begin with is run once, and stands before the padding."""
        rows = [row[real.bool()].tolist() for row, real in zip(context, attention_mask, strict=True)]
        same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*(row[:-1] for row in rows), strict=False))
        beginning = [tokens[0] for tokens in same]
        # A sliding window counts the padding in between as tokens.
        window = getattr(self.model.config.get_text_config(), "sliding_window", None) or max_length
        if not beginning or len(rows) == 1 or max_length > window or not shares_beginnings(self.model):
            return super()._model_generate(context, max_length, stop, attention_mask=attention_mask, **options)
        start = torch.tensor([beginning], device=context.device)
        with torch.no_grad():
            cache = self.model(start, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(rows))
        rest, real = self._padded([row[len(beginning) :] for row in rows], "left")
        prompts = torch.cat([start.expand(len(rows), -1), rest], 1)
        options |= {"attention_mask": torch.cat([torch.ones_like(prompts[:, : len(beginning)]), real.long()], 1)}
        found = super()._model_generate(prompts, max_length, stop, past_key_values=cache, **options)
        return torch.cat([context, found[:, prompts.shape[1] :]], 1)


def _split(items: list, size: int) -> list[list]:
    return [items[at : at + size] for at in range(0, len(items), size)]


def _positions(mask: Tensor) -> Tensor:
    """The place of each token among the real ones, which the mask [rows, length] marks."""
    return (mask.cumsum(1) - 1).clamp(min=0)
