"""Gates: the modules that compute routers. Reading their tensors and outputs, and finding out which router they compute."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from .routers import CHOSEN_SOFTMAX, SPARSEMIXER, Router


def unpack(output) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [tokens, n], weights [tokens, k] and indices [tokens, k], the first three values that a gate returned. ValueError
    when it returned something else."""
    if isinstance(output, tuple) and len(output) >= 3 and all(torch.is_tensor(t) and t.ndim == 2 for t in output[:3]):
        return output[:3]
    raise ValueError("it does not return logits, weights and indices")


def all_logits(router: Router, gate: nn.Module, inputs: tuple, logits: Tensor) -> Tensor:
    """The logits that a gate returned, followed by those of shared experts, which it does not return."""
    if not router.shared:
        return logits
    weight = matrix(gate, logits.shape[1] + router.shared).to(logits.device)
    both = nn.functional.linear(inputs[0].reshape(-1, weight.shape[1]).float(), weight.float())
    return torch.cat([logits, both[:, -router.shared :]], 1)


def matrix(gate: nn.Module, rows: int) -> Tensor | None:
    """The gate's own matrix with this many rows, or None."""
    names = (name for name, p in gate.named_parameters(recurse=False) if p.ndim == 2 and p.shape[0] == rows)
    return next((stored_tensor(gate, name) for name in names), None)


def table(gate: nn.Module) -> str | None:
    """The name of a gate's table from token ids to experts, integers [vocabulary, k], or None."""
    return next((name for name, b in gate.named_buffers() if b.ndim == 2 and not b.is_floating_point()), None)


def stored_tensor(module: nn.Module, name: str) -> Tensor:
    """A tensor by its name within a module; an offloaded one is read from accelerate's offload."""
    place, _, attribute = name.rpartition(".")
    owner = module.get_submodule(place)
    tensor = getattr(owner, attribute)
    return owner._hf_hook.weights_map[attribute] if tensor.is_meta else tensor


def device_of(module: nn.Module, weight: Tensor) -> torch.device:
    """The device on which a module computes with this weight, which is "meta" while it is offloaded."""
    return torch.device(module._hf_hook.execution_device) if weight.is_meta and hasattr(module, "_hf_hook") else weight.device


def per_expert(block: nn.Module, gate: nn.Module, n: int, extra: int = 0) -> Iterator[tuple[nn.Module, str, int]]:
    """The tensors of a router and of the block itself with n (or n + extra) entries along an axis: owner, name, axis."""
    for module in (*gate.modules(), block):
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            axes = [axis for size in (n, n + extra) for axis, there in enumerate(tensor.shape) if there == size]
            if axes and tensor.is_floating_point():
                yield module, name, axes[0]


# --- which router a gate computes -----------------------------------------------------------------------------------


@torch.no_grad()
def identify(block: nn.Module, gate: nn.Module, n: int) -> tuple[Router, int]:
    """The router that a gate computes, and its k: the one whose choice and weights equal the gate's on random input.

    Vectors with one number per expert are perturbed, to show how the gate uses them.
    Raises ValueError, with the reason, when no known router fits.
    """
    generator = torch.Generator().manual_seed(0)
    weight = next(p for p in gate.parameters() if p.ndim == 2)
    probe = torch.randn(1, 64, weight.shape[1], generator=generator).to(device_of(gate, weight), weight.dtype)
    ids = torch.arange(64, device=probe.device) % (len(stored_tensor(gate, table(gate))) if table(gate) else 64)
    arguments = [ids[None] if name is None else getattr(block, name) for name in _arguments(block, gate)]
    shared, idle = _extra_logits(gate, _call(gate, probe, arguments), n)
    indexed = list(per_expert(block, gate, n, shared + idle))
    places = [(module, name) for module, name, _ in indexed if getattr(module, name).numel() in (n, n + idle)]
    if shared:
        places += [(gate, name) for name, p in gate.named_parameters(recurse=False) if p.numel() == 1]

    def perturb(values: Tensor) -> Tensor:
        values = values + 0.3 * torch.rand(values.shape, generator=generator).to(values)
        if values.numel() == n + 1:  # a large bias of `idle` would make all tokens choose it
            values[-1] = values[:-1].min()
        return values

    def numbers(place: tuple[nn.Module, str]) -> tuple[float, ...]:
        vector = stored_tensor(*place).flatten().tolist()
        return tuple(vector) * (n if len(vector) == 1 else 1)  # a scalar holds for every expert

    def spread(states: Tensor) -> Tensor:  # of the logits; where it is large, all routers give the same weights
        return _call(gate, states, arguments)[0].float().std().clamp(min=1e-3)

    with ExitStack() as stack:
        stack.enter_context(_changed([getattr(*place) for place in places], perturb))
        states = probe / (first := spread(probe))
        if first > 1 and (left := spread(states)) > 1.5:  # a norm in the gate undid the division
            matrices = [getattr(module, name) for module, name, _ in indexed if (module, name) not in places]
            stack.enter_context(_changed(matrices, lambda values: values / left))
        logits, weights, chosen, *more = _call(gate, states, arguments)
        plain = Router(shared=shared, idle=idle, table=table(gate) is not None)
        logits = all_logits(plain, gate, (states,), logits)
        if idle:  # for no expert, the gate returns some expert with weight 0
            chosen = chosen.masked_fill(weights == 0, n)
            if (chosen == n).all():
                raise ValueError("it uses no expert on random input")
        vectors = {numbers(place): place for place in places}
        # An offloaded vector is not perturbed, so a small bias may change no choice: try the vectors before None.
        offloaded = any(getattr(*place).is_meta for place in places)
        biases = [*vectors, None] if offloaded else [None, *vectors]
        found = _router(gate, plain, (logits, weights, chosen), [None, *vectors], biases)
        if plain.table:
            _check_table(gate, chosen, ids)
        if shared and not torch.equal(found.shared_weights(logits, chosen), more[0]):
            raise ValueError("it weighs its shared experts in a way not known here")
    original = {None: None} | {perturbed: numbers(place) for perturbed, place in vectors.items()}
    return replace(found, bias=original[found.bias], expert_scale=original[found.expert_scale]), chosen.shape[1]


def _extra_logits(gate: nn.Module, answer: tuple, n: int) -> tuple[int, int]:
    """The numbers of `shared` and of `idle` logits, from a gate's output. Raises ValueError for any other logits."""
    logits, more = answer[0], answer[3:]
    if logits.shape[1] == n and more and torch.is_tensor(more[0]) and more[0].ndim == 2:
        if matrix(gate, n + more[0].shape[1]) is None:
            raise ValueError("it weighs shared experts in a way not known here")
        return more[0].shape[1], 0
    if logits.shape[1] not in (n, n + 1):
        raise ValueError(f"it chooses among {logits.shape[1]} things where there are {n} experts")
    return 0, logits.shape[1] - n


def _check_table(gate: nn.Module, chosen: Tensor, ids: Tensor) -> None:
    rows = stored_tensor(gate, table(gate)).to(chosen.device)
    if not torch.equal(rows[ids].long(), chosen):
        raise ValueError("it does not choose by its table of token ids alone")
    ordered = rows.sort(1).values
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise ValueError("its table sends token ids to one expert twice: the table is not filled, or was pruned another way")


def _arguments(block: nn.Module, gate: nn.Module) -> list[str | None]:
    """The gate's arguments after the hidden states, as names of the block's attributes; None for the token ids. Optional ones
    that the block lacks, such as the previous layer's state, are left out. Raises ValueError for required ones."""
    parameters = list(inspect.signature(gate.forward).parameters.values())[1:]
    passed = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and (hasattr(block, p.name) or p.default is p.empty)]
    for p in passed:
        if not hasattr(block, p.name) and (p.name != "input_ids" or table(gate) is None):
            raise ValueError(f"it chooses by {p.name!r} as well, not by the hidden states alone")
    return [p.name if hasattr(block, p.name) else None for p in passed]


def _call(gate: nn.Module, probe: Tensor, arguments: list) -> tuple[Tensor, ...]:
    """A gate's output for [1, tokens, d], or for [tokens, d], which some families' blocks pass; hooks are not called."""
    for states, last in ((probe, False), (probe[0], True)):
        try:
            answer = gate.forward(states, *arguments)
            return (*unpack(answer), *answer[3:])
        except (TypeError, RuntimeError, IndexError, ValueError) as error:
            if last:
                raise ValueError(str(error).split("\n")[0]) from None


@contextmanager
def _changed(tensors: Sequence[Tensor], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Changes these tensors in place, except offloaded ones, and restores them afterwards."""
    former = [(tensor, tensor.clone()) for tensor in tensors if not tensor.is_meta]
    try:
        for tensor, values in former:
            tensor.copy_(change(values))
        yield
    finally:
        for tensor, values in former:
            tensor.copy_(values)


def _router(gate, plain: Router, answer: tuple, scales: Sequence, biases: Sequence) -> Router:
    """The router that gives this answer (logits, weights, choice), with one of the scales and of the biases."""
    logits, _, chosen = answer
    for weighing in _weighing(gate, plain, *answer, scales):
        if plain.table:  # the table chooses, not the logits
            return weighing
        for router in _choosing(gate, weighing, biases):
            ranking = router.ranking(logits)
            best = ranking.topk(chosen.shape[1]).values.sort(1).values
            if torch.equal(ranking.gather(1, chosen).sort(1).values, best):  # by value: ties may go either way
                return router
    raise ValueError("it computes its routing weights or its choice in a way not known here")


def _weighing(gate, plain: Router, logits, weights, chosen, scales: Sequence) -> Iterator[Router]:
    """The routers that compute exactly these weights for these choices."""
    plain, k = replace(plain, dtype=str(weights.dtype).removeprefix("torch.")), weights.shape[1]
    numbers = {v for v in vars(gate).values() if isinstance(v, int | float) and not isinstance(v, bool) and v > 0}
    scores = ("softmax", CHOSEN_SOFTMAX, "sigmoid", "sqrtsoftplus", "given")
    kinds = [replace(plain, score=score, float32_scores=wide) for wide in (True, False) for score in scores]
    kinds += [replace(plain, score=SPARSEMIXER, float32_scores=False, jitter=number) for number in numbers]
    if plain.shared:
        kinds = [replace(plain, score="sigmoid")]
    used = chosen < logits.shape[1] - plain.idle
    for renormalise, kind, expert_scale in itertools.product((True, False), kinds, scales):
        if renormalise and kind.score == SPARSEMIXER:  # without near ties in the probe both its weights are 1: a constant sum
            continue
        scaled = replace(kind, renormalise=renormalise, expert_scale=expert_scale)
        ratio = (weights / scaled.weights(logits, chosen))[used].double().median().item()
        scale = min(sorted({1.0, 1 / k, *numbers}), key=lambda s: abs(s - ratio))
        for eps in (0.0, 1e-6, *(number for number in numbers if number < 1e-2)) if renormalise else (0.0,):
            found = replace(scaled, scale=scale, eps=eps)
            if torch.equal(found.weights(logits, chosen)[used], weights[used]):
                yield found


def _choosing(gate, router: Router, biases: Sequence) -> Iterator[Router]:
    """The router with every way of choosing that its gate allows."""
    number = lambda *names: next((v for n in names if isinstance(v := getattr(gate, n, None), int)), 1)  # noqa: E731
    groups, top = number("num_group", "n_group"), number("topk_group")
    for by_logits, bias in itertools.product((False, True), biases):
        candidate = replace(router, by_logits=by_logits, bias=bias)
        yield candidate
        for size, zero in itertools.product((2, 1), (False, True)) if groups > 1 else ():
            yield replace(candidate, groups=groups, top_groups=top, group_size=size, zero_fill=zero)
