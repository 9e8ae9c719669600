"""Runs experts on chosen (token, expert) pairs. Dropped pairs cost no computation and no reading of weights."""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .. import kernels
from ..machine import flop_per_second

BLOCK = 2048  # rows per product of one expert on a CPU
ACTIVATED = 256  # rows activated at a time, so that they stay in a core's cache
FEW = 256  # up to so many pairs, reading weights takes a GPU's time, not arithmetic

_FLOAT32 = torch.empty(0)

Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def run_experts(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Runs the experts as stock transformers does, [tokens, d] -> [tokens, d], in any dtype a CPU or GPU computes in."""
    if hidden_states.device.type == "cpu":  # grouped products refuse float64 on a CPU
        return type(experts).forward.__wrapped__(experts, hidden_states, top_k_index, top_k_weights)
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, hidden_states, top_k_index, top_k_weights)


def weighted_sum(outputs: Tensor, chosen: Tensor, weights: Tensor, ranks: Tensor, implementation: str | None) -> Tensor:
    """The sum [tokens, d] of experts' outputs [tokens, k, d] times weights [tokens, k], rounded as stock transformers does.

    In half precision, "eager" adds one by one in the order of expert numbers; others sum all at once in the order `ranks`.
    """
    if outputs.dtype in (torch.float32, torch.float64):
        first, *rest = zip(outputs.unbind(1), weights.to(outputs.dtype)[:, :, None].unbind(1), strict=True)
        total = torch.mul(*first)
        for pair in rest:  # a batched product of so small matrices takes a CPU several times as long
            total.addcmul_(*pair)
        return total
    parts = outputs * weights[:, :, None]
    ranks = chosen.argsort(1) if implementation == "eager" else ranks
    parts = parts.gather(1, ranks[:, :, None].expand_as(parts))
    if implementation != "eager":
        return parts.sum(1).to(outputs.dtype)
    return sum(parts.to(outputs.dtype).unbind(1))


class Scratch:
    """Buffers reused for every result: on a CPU, page faults of new buffers take up to a tenth of a trace's time."""

    def __init__(self):
        self.held: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(held.nbytes for held in self.held.values())

    def empty(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """An uninitialised tensor with dtype and device of `like`, valid until the next call with the same name."""
        size, held = math.prod(shape), self.held.get(name)
        if held is None or held.numel() < size or (held.dtype, held.device) != (like.dtype, like.device):
            held = self.held[name] = like.new_empty(size)
        return held[:size].view(shape)


def pair_outputs(experts: nn.Module, hidden_states: Tensor, expert: Tensor, scratch: Scratch | None = None) -> Tensor:
    """The unweighted outputs [tokens, m, d] of m experts for each token of hidden_states [tokens, d].

    expert: int64 [tokens, m]; the number n (`num_experts`) marks a dropped pair, whose output is 0. A grouped product on a
    GPU does not make the host wait. With `scratch` the result lies in its buffers and has no gradient.
    """
    if len(expert) == 1 and expert.device.type == "cpu" and not (scratch or torch.compiler.is_compiling()):
        return _of_one_token(experts, hidden_states, expert)
    product = _product(experts, hidden_states, expert.numel(), scratch is not None)
    if product is None:
        return _one_after_another(experts, hidden_states, expert, scratch)
    return _grouped(experts, hidden_states, expert, product)


def _product(experts: nn.Module, hidden_states: Tensor, pairs: int, scratch: bool) -> Product | None:
    """The fastest grouped product on this device; None where experts run faster one after another."""
    weight = experts.down_proj
    device, dtype = weight.device, weight.dtype
    differentiated = torch.is_grad_enabled() and (weight.requires_grad or hidden_states.requires_grad)
    own = kernels.product if torch.compiler.is_compiling() else kernels.launch  # a registered operator costs 13 us a call
    if device.type == "cpu":
        if torch.compiler.is_compiling():
            return own
        if scratch or differentiated or dtype not in (torch.float32, torch.bfloat16):
            return None
        lines = all(size * p.itemsize % 16 == 0 for p in experts.parameters() if p.ndim == 3 for size in p.shape[1:])
        return grouped_mm if lines else None
    if device.type != "cuda":
        return None
    # Before Hopper, or in other dtypes, torch's own product waits for the host and loops.
    hopper = dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] in (9, 10)
    if not differentiated and not (hopper and pairs > FEW) and kernels.works(device, dtype):
        return own
    return grouped_mm if hopper else None


def grouped_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """torch's own grouped product; rows after the last end are not initialised."""
    return torch.nn.functional.grouped_mm(rows, weight, offs=ends)


def _grouped(experts, hidden_states: Tensor, expert: Tensor, product: Product) -> Tensor:
    """`pair_outputs` as two products over all pairs, sorted by expert; dropped pairs come last."""
    flat = expert.flatten()
    order = flat.argsort(stable=True)
    of = flat[order]  # [pairs]
    ends = torch.searchsorted(of, torch.arange(experts.num_experts, device=of.device), right=True).int()
    dropped = of[:, None] == experts.num_experts

    def zero_dropped(x: Tensor) -> Tensor:
        # Rows after the last end are not initialised; they must not reach a result or a gradient.
        return x.masked_fill(dropped, 0) if torch.is_grad_enabled() else x

    def linear(name: str, x: Tensor) -> Tensor:
        weight = getattr(experts, name)
        x = product(x, weight if experts.is_transposed else weight.mT, ends)
        bias = getattr(experts, f"{name}_bias")[of.clamp(max=experts.num_experts - 1)] if experts.has_bias else None
        return zero_dropped(x if bias is None else x + bias)

    rows = zero_dropped(hidden_states[order // expert.shape[1]])
    sorted_outputs = _mlp(experts, linear, rows).masked_fill(dropped, 0)
    return torch.empty_like(sorted_outputs).index_copy(0, order, sorted_outputs).view(*expert.shape, -1)


def _mlp(experts, linear: Callable[[str, Tensor], Tensor], x: Tensor, rows: int = 0) -> Tensor:
    """The experts' MLP, [rows, d] -> [rows, d], from the attributes of the experts interface. rows: how many rows to activate
    in place at a time (0: all, not in place)."""
    up, activate = ("gate_up_proj", experts._apply_gate) if experts.has_gate else ("up_proj", experts.act_fn)
    hidden = linear(up, x)
    if rows:
        inner = hidden.shape[1] // (2 if experts.has_gate else 1)
        for part in hidden.split(rows):
            part[:, :inner] = activate(part)
        hidden = hidden[:, :inner]
    else:
        hidden = activate(hidden)
    out = linear("down_proj", hidden)
    return experts.post_expert_norm(out) if getattr(experts, "has_post_expert_norm", False) else out


def _one_after_another(experts, hidden_states: Tensor, expert: Tensor, scratch: Scratch | None) -> Tensor:
    """`pair_outputs` with products that read each expert's weights in place."""
    flat, n = expert.flatten(), experts.num_experts
    shape = (len(flat), hidden_states.shape[1])
    outputs = scratch.empty("outputs", hidden_states, *shape) if scratch else hidden_states.new_empty(shape)
    counts = torch.bincount(flat, minlength=n + 1).tolist()
    for number, pairs in enumerate(flat.argsort().split(counts)):
        for rows in pairs.split(BLOCK) if len(pairs) else ():
            x = hidden_states.index_select(0, rows // expert.shape[1])
            if number < n:  # twice as fast as an assignment
                outputs.index_copy_(0, rows, one_expert(experts, number, x, scratch))
            else:
                outputs.index_fill_(0, rows, 0.0)
    return outputs.view(*expert.shape, -1)


def _of_one_token(experts, hidden_states: Tensor, expert: Tensor) -> Tensor:
    """`pair_outputs` of a single token. There is nothing to sort: that takes as long as a small expert."""
    numbers, none = expert[0].tolist(), torch.zeros_like(hidden_states)
    return torch.stack([one_expert(experts, i, hidden_states) if i < experts.num_experts else none for i in numbers], 1)


@cache
def _slow_on_a_cpu(dtype: torch.dtype) -> bool:
    """Whether products in half precision are slower than in float32: without instructions for the dtype, two to five times.
    With them they are twice as fast, so that a busy moment does not decide."""
    half = dtype in (torch.bfloat16, torch.float16)
    return half and flop_per_second(dtype, 512, "cpu") < flop_per_second(torch.float32, 512, "cpu")


def one_expert(experts, number: int, x: Tensor, scratch: Scratch | None = None, on_input=None) -> Tensor:
    """One expert's outputs [rows, d] for x [rows, d]; on_input(name, x) gets each weight's name and its input.

    With `scratch`, a CPU that is slow in half precision multiplies in float32 and rounds each product once: what it does in
    half precision, too, in another order of summation.
    """
    wide = scratch is not None and x.device.type == "cpu" and _slow_on_a_cpu(x.dtype)

    def widened(name: str, narrow: Tensor) -> Tensor:
        return scratch.empty(f"wide {name}", _FLOAT32, *narrow.shape).copy_(narrow) if wide else narrow

    def linear(name: str, x: Tensor) -> Tensor:
        if on_input:
            on_input(name, x)
        like, x, weight = x, widened("input", x), widened("weight", getattr(experts, name)[number])
        weight = weight if experts.is_transposed else weight.T
        out = scratch.empty(f"wide {name}" if wide else name, x, len(x), weight.shape[1]) if scratch else None
        if experts.has_bias:
            out = torch.addmm(getattr(experts, f"{name}_bias")[number].to(x.dtype), x, weight, out=out)
        else:
            out = torch.mm(x, weight, out=out)
        return scratch.empty(name, like, *out.shape).copy_(out) if wide else out

    return _mlp(experts, linear, x, ACTIVATED if scratch else 0)
