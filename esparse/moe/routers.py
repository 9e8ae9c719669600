"""Routers: selection, routing weights, the pairs that skipping drops, and how a router's kind is identified."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

CHOSEN_SOFTMAX = "softmax of chosen"
SPARSEMIXER = "sparsemixer"


@dataclass(frozen=True)
class Router:
    """The arithmetic of a router, repeatable for any subset of the experts.

    score: "softmax" over the experts (Mixtral, OLMoE), "softmax of chosen" (gpt-oss, Granite: top-k first), "sigmoid"
    (DeepSeek-V3, MiniMax-M2), "sqrtsoftplus" (DeepSeek-V4), "given" (the router returns probabilities, Gemma 4) or
    "sparsemixer" (PhiMoE, with its `jitter`). Scores are float32 if `float32_scores`, else of the logits' dtype. Experts are
    ranked by score (`by_logits`: by logit) plus `bias`, within the `top_groups` best of `groups`. Weights are divided by their
    sum plus `eps` if `renormalise`, then multiplied by `scale` and by each expert's own `expert_scale`, and are of `dtype`.
    Operations have the stock routers' order, so that weights agree to the last bit.

    table: a table looked up by token id gives a token's experts, instead of a ranking (see `table_ranking`). shared, idle:
    the number of extra logits after the experts', which pruning never removes. The sigmoids of `shared` experts enter the sum
    that divides the chosen experts' sigmoids (Inkling). A token that chooses `idle` uses no expert (ZAYA).
    """

    score: str = "softmax"
    float32_scores: bool = True
    renormalise: bool = False
    eps: float = 0.0
    scale: float = 1.0
    dtype: str = "float32"
    by_logits: bool = False
    bias: tuple[float, ...] | None = None
    expert_scale: tuple[float, ...] | None = None
    groups: int = 1
    top_groups: int = 1
    group_size: int = 2  # a group's score is the sum of this many best scores in it
    zero_fill: bool = False  # experts outside the best groups score 0, else -inf
    jitter: float = 0.0
    table: bool = False
    shared: int = 0
    idle: int = 0

    @property
    def extra_logits(self) -> int:
        """The number of logits after those of the experts."""
        return self.shared + self.idle

    @property
    def keeps_ranking(self) -> bool:
        """Whether removing experts leaves the ranking of the others unchanged, so that a token's reach is known beforehand."""
        return self.groups == 1 and not (self.bias and self.score == "softmax" and not self.by_logits)

    @property
    def normalises(self) -> bool:
        """Whether a token's weights have the same sum for every choice; skipping then keeps that sum."""
        return self.renormalise or bool(self.shared) or self.score == CHOSEN_SOFTMAX

    @property
    def depends_on_chosen_only(self) -> bool:
        """Whether the chosen experts' logits alone determine the weights (up to rounding, for a renormalised softmax)."""
        kind = self.score != SPARSEMIXER and (self.score != "softmax" or (self.renormalise and not self.eps))
        return self.keeps_ranking and not self.extra_logits and kind

    @property
    def sorted(self) -> bool:
        """Whether experts are selected in the order of falling weights."""
        return not (self.bias or self.expert_scale or self.table or self.score == SPARSEMIXER)

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """The scores [tokens, r] from which routing weights are computed."""
        logits = logits.float() if self.float32_scores else logits
        match self.score:
            case "sigmoid":
                return logits.sigmoid()
            case "sqrtsoftplus":
                return nn.functional.softplus(logits).sqrt()
            case "given":
                return logits
            case _:
                return logits.softmax(-1)

    def ranking(self, logits: torch.Tensor, columns: torch.Tensor | None = None) -> torch.Tensor:
        """The values [tokens, r] whose top-k are chosen, of all experts or of the experts `columns` [r], followed by `idle`."""
        if self.shared:
            logits, columns = logits[:, : -self.shared], None if columns is None else columns[: -self.shared]
        scores = logits if self.by_logits or self.score in (CHOSEN_SOFTMAX, SPARSEMIXER) else self.scores(logits)
        if self.bias:
            scores = scores + _column(self.bias, logits, columns)
        return self._within_groups(scores) if self.groups > 1 else scores

    def _within_groups(self, scores: torch.Tensor) -> torch.Tensor:
        grouped = scores.unflatten(-1, (self.groups, -1))  # [tokens, groups, r / groups]
        best = grouped.topk(self.group_size, -1).values.sum(-1).topk(self.top_groups, -1).indices
        allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, best, True)
        return grouped.masked_fill(~allowed[..., None], 0.0 if self.zero_fill else float("-inf")).flatten(-2)

    def weights(self, logits: torch.Tensor, chosen: torch.Tensor, numbers: torch.Tensor | None = None) -> torch.Tensor:
        """Routing weights [tokens, ..., k] of the `chosen` columns of `logits` [tokens, r].

        numbers: the experts' own numbers where the columns are a subset (None: `chosen`).
        """
        if self.shared:
            weights = self._among_shared(logits, chosen)[:, : chosen.shape[1]]
        elif self.score == SPARSEMIXER:
            weights = self._sparsemixer(logits, chosen)
        elif self.score in ("softmax", "given"):
            weights = self.scores(logits).gather(1, chosen.flatten(1)).view(chosen.shape)
        else:
            weights = self.scores(logits.gather(1, chosen.flatten(1)).view(chosen.shape))
        if self.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + self.eps)
        if self.scale != 1:
            weights = weights * self.scale
        if self.expert_scale:
            weights = weights * _column(self.expert_scale, logits, chosen if numbers is None else numbers)
        return weights.to(getattr(torch, self.dtype))

    def shared_weights(self, logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """The weights [tokens, shared] of the shared experts, given the chosen ones."""
        weights = self._among_shared(logits, chosen)[:, chosen.shape[1] :] * self.scale
        return (weights * self.expert_scale[0]).to(getattr(torch, self.dtype))

    def _among_shared(self, logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """The chosen and the shared experts' sigmoids, divided by the sum of all: [tokens, k + shared]."""
        logs = nn.functional.logsigmoid(torch.cat([logits.gather(1, chosen), logits[:, -self.shared :]], 1))
        return (logs - logs.logsumexp(1, keepdim=True)).exp()

    @property
    def total_weight(self) -> float:
        """The sum of a token's weights and those of the `shared` experts."""
        return self.scale * self.expert_scale[0]

    def _sparsemixer(self, logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Each choice's softmax over the experts not yet chosen whose logits are close to the best (arXiv 2409.12136)."""
        weights, left = [], logits
        for expert in chosen.split(1, 1):
            best = left.amax(1, keepdim=True)
            far = (best - logits) / logits.abs().clamp(min=best) > 2 * self.jitter
            weights.append(left.masked_fill(far, float("-inf")).softmax(1).gather(1, expert))
            left = left.scatter(1, expert, float("-inf"))
        return torch.cat(weights, 1)


def read_router(entry: dict) -> Router:
    """A router from its `asdict`, as read from JSON."""
    return Router(**{name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()})


def _column(values: tuple[float, ...], like: torch.Tensor, numbers: torch.Tensor | None) -> torch.Tensor:
    column = torch.tensor(values, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    return column if numbers is None else column[numbers]


def table_ranking(chosen: torch.Tensor, n: int) -> torch.Tensor:
    """A ranking float32 [tokens, n] that replaces a table of token ids when experts are removed.

    A token keeps its table entries among e_1..e_k whose experts stay, in their order. Each removed entry is replaced by the
    next kept expert that the token does not use yet, by number from (e_1 + ... + e_k) mod n on. The result depends on the
    token's row alone, so the smaller model's table can hold it. A removed expert's token ids spread over the others as evenly
    as the table spreads all token ids.
    """
    start, numbers = chosen.sum(1, keepdim=True), torch.arange(n, device=chosen.device)
    own = torch.arange(chosen.shape[1], 0, -1, device=chosen.device).expand_as(chosen)
    return (-((numbers - start) % n)).scatter(1, chosen, own).float()


def pruned_table(table: torch.Tensor, kept: Sequence[int], n: int) -> torch.Tensor:
    """The table [vocabulary, k] of a model with the experts `kept` alone, in their new numbers."""
    columns = torch.tensor(kept, device=table.device)
    return table_ranking(table.long(), n)[:, columns].topk(table.shape[1]).indices.to(table.dtype)


def unpack(output) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [tokens, n], weights [tokens, k] and indices [tokens, k], the first three values that a gate returned.

    Raises ValueError when it returned something else.
    """
    if isinstance(output, tuple) and len(output) >= 3 and all(torch.is_tensor(t) and t.ndim == 2 for t in output[:3]):
        return output[:3]
    raise ValueError("it does not return logits, weights and indices")


def all_logits(router: Router, gate: nn.Module, inputs: tuple, logits: torch.Tensor) -> torch.Tensor:
    """The logits that a gate returned, followed by those of shared experts, which it does not return."""
    if not router.shared:
        return logits
    weight = matrix(gate, logits.shape[1] + router.shared).to(logits.device)
    both = nn.functional.linear(inputs[0].reshape(-1, weight.shape[1]).float(), weight.float())
    return torch.cat([logits, both[:, -router.shared :]], 1)


def matrix(gate: nn.Module, rows: int) -> torch.Tensor | None:
    """The gate's own matrix with this many rows, or None."""
    names = (name for name, p in gate.named_parameters(recurse=False) if p.ndim == 2 and p.shape[0] == rows)
    return next((stored_tensor(gate, name) for name in names), None)


def table(gate: nn.Module) -> str | None:
    """The name of a gate's table from token ids to experts, integers [vocabulary, k], or None."""
    return next((name for name, b in gate.named_buffers() if b.ndim == 2 and not b.is_floating_point()), None)


def stored_tensor(module: nn.Module, name: str) -> torch.Tensor:
    """A module's tensor; an offloaded one is read from accelerate's offload."""
    tensor = getattr(module, name)
    return module._hf_hook.weights_map[name] if tensor.is_meta else tensor


def device_of(module: nn.Module, weight: torch.Tensor) -> torch.device:
    """The device on which a module computes with this weight, which is "meta" while it is offloaded."""
    return torch.device(module._hf_hook.execution_device) if weight.is_meta and hasattr(module, "_hf_hook") else weight.device


def per_expert(block: nn.Module, gate: nn.Module, n: int, extra: int = 0) -> Iterator[tuple[nn.Module, str, int]]:
    """The tensors of a router and of the block itself with n (or n + extra) entries along an axis: owner, name, axis."""
    for module in (*gate.modules(), block):
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            axes = [axis for size in (n, n + extra) for axis, there in enumerate(tensor.shape) if there == size]
            if axes and tensor.is_floating_point():
                yield module, name, axes[0]


def skip_ratios(weights: torch.Tensor) -> torch.Tensor:
    """rho of the pairs 2..k: the tail's weight over the head's, (w_j + ... + w_k) / (w_1 + ... + w_{j-1}).

    `weights` [tokens, k] in falling order; returns [tokens, k - 1], also falling. For k = 2 it is w_2 / w_1 (paper,
    Section 3.3); for k > 2 the tail rule of A.2 with its own beta = H / (D - H).
    """
    weights = weights.float() if weights.dtype in (torch.bfloat16, torch.float16) else weights
    if weights.shape[1] == 2:  # the same numbers in one operation, for fast decoding
        return weights[:, 1:] / weights[:, :1]
    tails = weights.flip(1).cumsum(1).flip(1)[:, 1:]
    heads = weights.cumsum(1)[:, :-1]
    return tails / heads


def skip_pairs(weights: torch.Tensor, beta: float | torch.Tensor, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Which pairs stay, and the routing weights after skipping, both [tokens, k]; `weights` [tokens, k] in falling order.

    A pair j >= 2 whose ratio is below beta gets the weight 0. If `renormalise`, the others are rescaled to the token's former
    sum; the factor is computed first, so that a token without dropped pairs keeps every bit.
    """
    first = torch.ones_like(weights[:, :1], dtype=torch.bool)
    keep = torch.cat([first, skip_ratios(weights) >= beta], 1)
    kept = weights * keep
    if renormalise:
        kept = kept * (weights.sum(1, keepdim=True) / kept.sum(1, keepdim=True))
    return keep, kept


# --- finding the kind of a router -----------------------------------------------------------------------------------


@torch.no_grad()
def identify(block: nn.Module, gate: nn.Module, n: int) -> tuple[Router, int]:
    """The kind of a router, and its k: the kind whose choice and weights equal the gate's on random input.

    Vectors with one number per expert are perturbed, to show how the gate uses them.
    Raises ValueError, with the reason, when no known kind fits.
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
    original = [stored_tensor(*place) for place in places]

    def perturb(values: torch.Tensor) -> torch.Tensor:
        values = values + 0.3 * torch.rand(values.shape, generator=generator).to(values)
        if values.numel() == n + 1:  # a large bias of `idle` would make all tokens choose it
            values[-1] = values[:-1].min()
        return values

    with ExitStack() as stack:
        stack.enter_context(_changed([getattr(*place) for place in places], perturb))
        states = probe / (spread := _spread(gate, probe, arguments))
        if spread > 1 and (left := _spread(gate, states, arguments)) > 1.5:  # a norm in the gate undid the division
            matrices = [getattr(module, name) for module, name, _ in indexed if (module, name) not in places]
            stack.enter_context(_changed(matrices, lambda values: values / left))
        logits, weights, chosen, *more = _call(gate, states.to(probe.dtype), arguments)
        vectors = [(number, _as_tuple(stored_tensor(*place), n)) for number, place in enumerate(places)]
        plain = Router(shared=shared, idle=idle, table=table(gate) is not None)
        logits = all_logits(plain, gate, (states.to(probe.dtype),), logits)
        if idle:  # for no expert, the gate returns some expert with weight 0
            chosen = chosen.masked_fill(weights == 0, n)
            if (chosen == n).all():
                raise ValueError("it uses no expert on random input")
        # An offloaded vector is not perturbed, so a small bias may change no choice: try the vectors before None.
        offloaded = any(getattr(*place).is_meta for place in places)
        scales = [(None, None), *vectors]
        kind, fields = _kind(gate, plain, logits, weights, chosen, scales, [*vectors, (None, None)] if offloaded else scales)
        if plain.table:
            _check_table(gate, chosen, ids)
        if shared and not torch.equal(kind.shared_weights(logits, chosen), more[0]):
            raise ValueError("it weighs its shared experts in a way not known here")
    return replace(kind, **{field: _as_tuple(original[i], n) for field, i in fields.items()}), chosen.shape[1]


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


def _as_tuple(vector: torch.Tensor, n: int) -> tuple[float, ...]:
    """The numbers of a vector; a scalar is repeated n times."""
    return tuple(vector.flatten().tolist()) * (n if vector.numel() == 1 else 1)


def _check_table(gate: nn.Module, chosen: torch.Tensor, ids: torch.Tensor) -> None:
    rows = stored_tensor(gate, table(gate)).to(chosen.device)
    if not torch.equal(rows[ids].long(), chosen):
        raise ValueError("it does not choose by its table of token ids alone")
    ordered = rows.sort(1).values
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise ValueError("its table sends token ids to one expert twice: the table is not filled, or was pruned another way")


def _arguments(block: nn.Module, gate: nn.Module) -> list[str | None]:
    """The gate's arguments after the hidden states, as names of the block's attributes; None for the token ids.

    Optional arguments that the block lacks, such as the previous layer's state, are left out. Raises ValueError for required
    ones that it lacks.
    """
    parameters = list(inspect.signature(gate.forward).parameters.values())[1:]
    passed = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and (hasattr(block, p.name) or p.default is p.empty)]
    for p in passed:
        if not hasattr(block, p.name) and (p.name != "input_ids" or table(gate) is None):
            raise ValueError(f"it chooses by {p.name!r} as well, not by the hidden states alone")
    return [p.name if hasattr(block, p.name) else None for p in passed]


def _call(gate: nn.Module, probe: torch.Tensor, arguments: list) -> tuple[torch.Tensor, ...]:
    """A gate's output for [1, tokens, d], or for [tokens, d], which some families' blocks pass; hooks are not called."""
    for states, last in ((probe, False), (probe[0], True)):
        try:
            answer = gate.forward(states, *arguments)
            return (*unpack(answer), *answer[3:])
        except (TypeError, RuntimeError, IndexError, ValueError) as error:
            if last:
                raise ValueError(str(error).split("\n")[0]) from None


def _spread(gate: nn.Module, probe: torch.Tensor, arguments: list) -> torch.Tensor:
    """The standard deviation of the logits; where it is large, all kinds give the same weights."""
    return _call(gate, probe, arguments)[0].float().std().clamp(min=1e-3)


@contextmanager
def _changed(tensors: Sequence[torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Changes these tensors in place, except offloaded ones, and restores them afterwards."""
    former = [(tensor, tensor.clone()) for tensor in tensors if not tensor.is_meta]
    try:
        for tensor, values in former:
            tensor.copy_(change(values))
        yield
    finally:
        for tensor, values in former:
            tensor.copy_(values)


def _kind(gate, plain: Router, logits, weights, chosen, scales: list, biases: list) -> tuple[Router, dict[str, int]]:
    """The kind that reproduces the weights and the choice, and the indices of its `bias` and `expert_scale`."""
    for kind, fields in _weighing(gate, plain, logits, weights, chosen, scales):
        if kind.table:  # the table chooses, not the logits
            return kind, fields
        for candidate, bias in _choosing(gate, kind, biases):
            ranking = candidate.ranking(logits)
            best = ranking.topk(chosen.shape[1]).values.sort(1).values
            if torch.equal(ranking.gather(1, chosen).sort(1).values, best):  # by value: ties may go either way
                return candidate, fields | bias
    raise ValueError("it computes its routing weights or its choice in a way not known here")


def _weighing(gate, plain: Router, logits, weights, chosen, scales: list) -> Iterator[tuple[Router, dict[str, int]]]:
    """The kinds that compute exactly these weights for these choices."""
    plain, k = replace(plain, dtype=str(weights.dtype).removeprefix("torch.")), weights.shape[1]
    numbers = {v for v in vars(gate).values() if isinstance(v, int | float) and not isinstance(v, bool) and v > 0}
    scores = ("softmax", CHOSEN_SOFTMAX, "sigmoid", "sqrtsoftplus", "given")
    kinds = [replace(plain, score=score, float32_scores=wide) for wide in (True, False) for score in scores]
    kinds += [replace(plain, score=SPARSEMIXER, float32_scores=False, jitter=number) for number in numbers]
    if plain.shared:
        kinds = [replace(plain, score="sigmoid")]
    for kind in (replace(kind, renormalise=flag) for flag in (True, False) for kind in kinds):
        for i, values in scales:
            scaled = replace(kind, expert_scale=values)
            used = chosen < logits.shape[1] - plain.idle
            ratio = (weights / scaled.weights(logits, chosen))[used].double().median().item()
            scale = min(sorted({1.0, 1 / k, *numbers}), key=lambda s: abs(s - ratio))
            for eps in (0.0, 1e-6, *(number for number in numbers if number < 1e-2)) if kind.renormalise else (0.0,):
                found = replace(scaled, scale=scale, eps=eps)
                if torch.equal(found.weights(logits, chosen)[used], weights[used]):
                    yield found, {} if i is None else {"expert_scale": i}


def _choosing(gate, kind: Router, biases: list) -> Iterator[tuple[Router, dict[str, int]]]:
    """The kind in every variant of choosing that its gate allows."""
    number = lambda *names: next((v for n in names if isinstance(v := getattr(gate, n, None), int)), 1)  # noqa: E731
    groups, top = number("num_group", "n_group"), number("topk_group")
    for by_logits in (False, True):
        for i, values in biases:
            candidate = replace(kind, by_logits=by_logits, bias=values)
            field = {} if i is None else {"bias": i}
            yield candidate, field
            for size, zero in ((2, False), (2, True), (1, False), (1, True)) if groups > 1 else ():
                yield replace(candidate, groups=groups, top_groups=top, group_size=size, zero_fill=zero), field
