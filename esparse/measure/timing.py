"""Memory and generation speed of a model; and the parts that benchmarks share: turns, records, tables, random weights."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache, MixtralConfig, StaticCache

from ..files import write_json
from ..machine import machine, peak_memory, seconds_of
from ..moe.layers import moe_layers
from ..moe.running import evaluating, input_device

MIB = 2**20
T = TypeVar("T")
MIXTRAL_8X7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


def rise_of_memory(call: Callable[[], object]) -> int:
    """The bytes by which resident memory rises at most during a call; 0 where the system does not tell (not on Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present memory
    except OSError:
        return 0
    before = peak_memory()
    call()
    return peak_memory() - before


def measure_memory(model) -> dict:
    """MiB of all weights and of the experts' alone, and the peak of the GPU's memory (None without a GPU)."""
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors) / MIB  # noqa: E731
    peak = torch.cuda.max_memory_allocated() / MIB if torch.cuda.is_available() else None
    experts = size(p for layer in moe_layers(model) for p in layer.experts.parameters())
    return {"weights_mib": size(model.parameters()), "experts_mib": experts, "peak_mib": peak}


@torch.no_grad()
def measure_generation(
    model, *, batch_size: int = 1, prompt: int = 32, new_tokens: int = 64, seed: int = 0, cache: StaticCache | None = None
) -> dict[str, float]:
    """One timed pass over random tokens: the prompt in one step, then `new_tokens` one at a time with a cache.

    The tokens are given, not chosen, so that all variants of a model do the same work. cache: a static cache, reused; the
    decoding is then compiled, as in `generate(cache_implementation="static")` on a GPU. Returns the seconds of both parts
    and their tokens per second over all sequences. Warm up before, repeat and take medians.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (batch_size, prompt + new_tokens), generator=generator)
    ids = ids.to(input_device(model))
    if compiled := cache is not None:
        cache.reset()  # a new cache would have other addresses and invalidate the captured graphs
    else:
        cache = DynamicCache(config=model.config)

    def step(forward: Callable, since: int, until: int) -> None:
        forward(ids[:, since:until], past_key_values=cache, use_cache=True, logits_to_keep=1)

    def decode() -> None:
        with model._optimize_model_for_decode():  # as in `generate`, which takes another implementation for few tokens
            forward = model.get_compiled_call(CompileConfig()) if compiled else model
            for position in range(prompt, prompt + new_tokens):
                step(forward, position, position + 1)

    with evaluating(model):
        prefill, decoding = seconds_of(lambda: step(model, 0, prompt)), seconds_of(decode)
    return {
        "prefill_seconds": prefill,
        "decode_seconds": decoding,
        "prefill_tokens_per_second": batch_size * prompt / prefill,
        "tokens_per_second": batch_size * new_tokens / decoding,
    }


def processor_seconds(call: Callable[[], object]) -> float:
    """The processor seconds that this process spends on a call, all threads together."""
    started = time.process_time()
    call()
    return time.process_time() - started


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes on one thread meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def rounds(variants: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """The results of each variant in `repeats` rounds, after one round to warm up.

    The variants take turns, so that a slow moment of the machine affects all of them. Each round starts with another
    variant, since order matters too.
    """
    names, turns = list(variants), []
    for turn in range(repeats + 1):
        first = turn % len(names)
        turns.append({name: variants[name]() for name in names[first:] + names[:first]})
    return {name: [turn[name] for turn in turns[1:]] for name in names}


def median_ratio(ones: Sequence[float], others: Sequence[float]) -> float:
    """The median over rounds of one variant's value divided by another's."""
    return statistics.median(one / other for one, other in zip(ones, others, strict=True))


def keep(result: dict, out: Path | None) -> dict:
    """A benchmark's result with its machine. Rewritten to `out` after each part, so that an interruption loses nothing."""
    result = machine() | result
    if out:
        write_json(out, result)
    return result


def aligned(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows with equal columns as text, aligned to the right."""
    table = [list(rows[0]), *(list(map(_cell, row.values())) for row in rows)] if rows else []
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in table)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def report(tables: Mapping[str, Sequence[Mapping[str, object]]]) -> str:
    """Tables as text, by their titles."""
    return "\n\n".join(f"{title}\n{aligned(rows)}" for title, rows in tables.items())


def random_mixtral(shape: Mapping[str, object], experts: int, dtype: torch.dtype, device: str):
    """A Mixtral with random weights and two experts per token, made on the device without passing through host memory."""
    torch.manual_seed(0)
    with torch.device(device):
        config = MixtralConfig(**shape, num_local_experts=experts, num_experts_per_tok=2)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
