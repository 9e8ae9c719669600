"""Running experts on chosen (token, expert) pairs: what is dropped is not computed, and its weights are not read."""

import math
from collections.abc import Callable

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from . import kernels

BLOCK = 2048  # rows of one expert's product on a CPU
ACTIVATED = 256  # rows activated at a time, while they are in a core's cache
FEW = 256  # pairs up to which reading weights, not arithmetic, takes a GPU's time

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def run_experts(
    experts: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts as stock transformers runs them, [tokens, d] -> [tokens, d], in any dtype a CPU or GPU computes in."""
    if hidden_states.device.type == "cpu":  # grouped products refuse float64 there
        return type(experts).forward.__wrapped__(experts, hidden_states, top_k_index, top_k_weights)
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, hidden_states, top_k_index, top_k_weights)


def mixed(
    outputs: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, ranks: torch.Tensor, implementation: str | None
) -> torch.Tensor:
    """The sum [tokens, d] of experts' outputs [tokens, k, d] times weights [tokens, k], in half precision rounded as stock
    transformers rounds it: "eager" adds one by one in the experts' order, other implementations at once in the order `ranks`.
    """
    if outputs.dtype in (torch.float32, torch.float64):
        return (weights[:, None].to(outputs.dtype) @ outputs)[:, 0]
    parts = outputs * weights[:, :, None]
    ranks = chosen.argsort(1) if implementation == "eager" else ranks
    parts = parts.gather(1, ranks[:, :, None].expand_as(parts))
    if implementation != "eager":
        return parts.sum(1).to(outputs.dtype)
    return sum(parts.to(outputs.dtype).unbind(1))


class Scratch:
    """Memory that results are written into again and again. A CPU maps megabytes afresh for every large result, and
    those page faults cost a trace up to a tenth of its time."""

    def __init__(self):
        self.held: dict[str, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(held.nbytes for held in self.held.values())

    def empty(self, name: str, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """A tensor of dtype and device of `like`, whose values nobody has set; valid until `name` is asked for again."""
        size, held = math.prod(shape), self.held.get(name)
        if held is None or held.numel() < size or (held.dtype, held.device) != (like.dtype, like.device):
            held = self.held[name] = like.new_empty(size)
        return held[:size].view(shape)


def pair_outputs(
    experts: torch.nn.Module, hidden_states: torch.Tensor, expert: torch.Tensor, scratch: Scratch | None = None
) -> torch.Tensor:
    """The outputs [tokens, m, d] at weight one of m experts for each of hidden_states [tokens, d].

    expert: int64 [tokens, m]; a pair whose expert is n (`num_experts`) is dropped: its output is 0, nothing is computed
    for it and no weight is read. On a GPU all shapes are known beforehand and the host does not wait. With `scratch`
    the result lies in it, and nothing can be differentiated.
    """
    product = _product(experts, hidden_states, expert.numel(), scratch is not None)
    if product is None:
        return _one_after_another(experts, hidden_states, expert, scratch)
    return _grouped(experts, hidden_states, expert, product)


def _product(experts: torch.nn.Module, hidden_states: torch.Tensor, pairs: int, scratch: bool) -> Product | None:
    """What multiplies rows that are sorted by expert, best on this device; None: experts run one after another."""
    weight = experts.down_proj
    device, dtype = weight.device, weight.dtype
    differentiated = torch.is_grad_enabled() and (weight.requires_grad or hidden_states.requires_grad)
    own = kernels.product if torch.compiler.is_compiling() else kernels.launch  # an operator costs 13 us a call
    if device.type == "cpu":
        if torch.compiler.is_compiling():
            return own
        if scratch or differentiated or dtype not in (torch.float32, torch.bfloat16):
            return None
        lines = all(size * p.itemsize % 16 == 0 for p in experts.parameters() if p.ndim == 3 for size in p.shape[1:])
        return grouped_mm if lines else None
    if device.type != "cuda":
        return None
    # Before Hopper, and in other dtypes, torch's own waits for the host and loops.
    hopper = dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] in (9, 10)
    if not differentiated and not (hopper and pairs > FEW) and kernels.works(device, dtype):
        return own
    return grouped_mm if hopper else None


def ready(experts: torch.nn.Module) -> None:
    """Try what these experts would run with once, before anything is compiled or captured."""
    if experts.down_proj.device.type == "cuda":
        kernels.works(experts.down_proj.device, experts.down_proj.dtype)


def grouped_mm(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """torch's own grouped product, which leaves rows behind the last end as they were in memory."""
    return torch.nn.functional.grouped_mm(rows, weight, offs=ends)


def _grouped(experts, hidden_states: torch.Tensor, expert: torch.Tensor, product: Product) -> torch.Tensor:
    """`pair_outputs` as two products over all pairs, sorted by expert, with those dropped behind the last expert's."""
    flat = expert.flatten()
    order = flat.argsort(stable=True)
    of = flat[order]  # [pairs]
    ends = torch.searchsorted(of, torch.arange(experts.num_experts, device=of.device), right=True).int()

    dropped = of[:, None] == experts.num_experts

    def alone(x: torch.Tensor) -> torch.Tensor:
        # Rows behind the last end hold whatever was in memory: nothing of it may go on, nor come back as a gradient.
        return x.masked_fill(dropped, 0) if torch.is_grad_enabled() else x

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        weight = getattr(experts, name)
        x = product(x, weight if experts.is_transposed else weight.mT, ends)
        bias = getattr(experts, f"{name}_bias")[of.clamp(max=experts.num_experts - 1)] if experts.has_bias else None
        return alone(x if bias is None else x + bias)

    rows = alone(hidden_states[order // expert.shape[1]])
    sorted_outputs = _layers(experts, linear, rows).masked_fill(dropped, 0)
    return torch.empty_like(sorted_outputs).index_copy(0, order, sorted_outputs).view(*expert.shape, -1)


def _layers(experts, linear: Callable[[str, torch.Tensor], torch.Tensor], x: torch.Tensor, rows: int = 0) -> torch.Tensor:
    """[rows, d] -> [rows, d], by the attributes with which every family describes its experts to the interface.

    rows: how many are activated at a time, in place; 0: all, and anew.
    """
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


def _one_after_another(experts, hidden_states: torch.Tensor, expert: torch.Tensor, scratch: Scratch | None) -> torch.Tensor:
    """`pair_outputs` with products that read each expert's weights in place."""
    flat, n = expert.flatten(), experts.num_experts
    shape = (len(flat), hidden_states.shape[1])
    outputs = scratch.empty("outputs", hidden_states, *shape) if scratch else hidden_states.new_empty(shape)
    counts = torch.bincount(flat, minlength=n + 1).tolist()
    for number, pairs in enumerate(flat.argsort().split(counts)):
        for rows in pairs.split(BLOCK) if len(pairs) else ():
            x = hidden_states.index_select(0, rows // expert.shape[1])
            outputs[rows] = one_expert(experts, number, x, scratch) if number < n else 0.0
    return outputs.view(*expert.shape, -1)


def one_expert(
    experts: torch.nn.Module,
    number: int,
    x: torch.Tensor,
    scratch: Scratch | None = None,
    hear: Callable[[str, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """[rows, d] -> [rows, d]. With scratch, what lies between the products is computed while it is in a core's cache.

    hear: told of each weight's name and what enters it, [rows, in].
    """

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        if hear:
            hear(name, x)
        weight = getattr(experts, name)[number]
        weight = weight if experts.is_transposed else weight.T
        out = scratch.empty(name, x, len(x), weight.shape[1]) if scratch else None
        if experts.has_bias:
            return torch.addmm(getattr(experts, f"{name}_bias")[number], x, weight, out=out)
        return torch.mm(x, weight, out=out)

    return _layers(experts, linear, x, ACTIVATED if scratch else 0)
