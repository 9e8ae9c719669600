"""Router kinds and the arithmetic of routing weights: selection, renormalisation, and which pairs skipping drops."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

SCORES = ("softmax", "softmax of chosen", "sigmoid", "sqrtsoftplus", "given")
SPARSEMIXER = "sparsemixer"


@dataclass(frozen=True)
class Router:
    """What a router does with its logits, in numbers, so that it can be done again for any subset of the experts.

    score: "softmax" over the experts (Mixtral, OLMoE), "softmax of chosen" (gpt-oss, Granite: top-k first), "sigmoid"
    (DeepSeek-V3, MiniMax-M2), "sqrtsoftplus" (DeepSeek-V4), "given" (the router returns probabilities, Gemma 4) or
    "sparsemixer" (PhiMoE, with its `jitter`), in float32 if `wide`, else in the dtype of the logits. Experts are ranked
    by score, or `by_logits`, plus `bias`, within the `top_groups` best of `groups`. Weights are divided by their sum
    plus `eps` if `renormalise`, then multiplied by `scale` and by each expert's own `expert_scale`, and are of `dtype`.
    The order of operations is that of the stock routers, so that weights agree to the last bit.

    table: which experts a token uses is looked up by its id, not ranked (see `table_ranking`). `beside` logits stand behind
    those of the experts, and stay whatever is removed: those of `shared` experts, by whose sigmoids too the chosen experts'
    are divided (Inkling), or of `idle`, which a token chooses to use no expert (ZAYA).
    """

    score: str = "softmax"
    wide: bool = True
    renormalise: bool = False
    eps: float = 0.0
    scale: float = 1.0
    dtype: str = "float32"
    by_logits: bool = False
    bias: tuple[float, ...] | None = None
    expert_scale: tuple[float, ...] | None = None
    groups: int = 1
    top_groups: int = 1
    group_size: int = 2  # experts whose scores make a group's
    zero_fill: bool = False  # what experts of other groups score: 0, or -inf
    jitter: float = 0.0
    table: bool = False
    shared: int = 0
    idle: int = 0

    @property
    def beside(self) -> int:
        """How many logits stand behind those of the experts."""
        return self.shared + self.idle

    @property
    def local(self) -> bool:
        """Whether fewer experts rank in the order that all have: then a token's reach is known beforehand."""
        return self.groups == 1 and not (self.bias and self.score == "softmax" and not self.by_logits)

    @property
    def normalises(self) -> bool:
        """Whether the weights of a token add up to the same whatever was chosen: skipping then keeps their sum."""
        return self.renormalise or bool(self.shared) or self.score == SCORES[1]

    @property
    def by_choice(self) -> bool:
        """Whether weights follow from the chosen experts alone (those of a renormalised softmax: but for rounding)."""
        kind = self.score != SPARSEMIXER and (self.score != "softmax" or (self.renormalise and not self.eps))
        return self.local and not self.beside and kind

    @property
    def of_chosen(self) -> "Router":
        """The router that gives, where `by_choice`, the same weights but for rounding from the chosen experts' logits alone."""
        return replace(self, score=SCORES[1], renormalise=False) if self.score == "softmax" else self

    @property
    def sorted(self) -> bool:
        """Whether the order of selection is that of falling weights."""
        return not (self.bias or self.expert_scale or self.table or self.score == SPARSEMIXER)

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """What routing weights are made of, [tokens, r]."""
        logits = logits.float() if self.wide else logits
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
        """What the experts are chosen by, the highest first: [tokens, r], for all or the experts `columns` [r].

        Behind them that of `idle`, if there is one: columns then names it as well.
        """
        if self.shared:
            logits, columns = logits[:, : -self.shared], None if columns is None else columns[: -self.shared]
        scores = logits if self.by_logits or self.score in (SCORES[1], SPARSEMIXER) else self.scores(logits)
        if self.bias:
            scores = scores + _column(self.bias, logits, columns)
        return self._within_groups(scores) if self.groups > 1 else scores

    def _within_groups(self, scores: torch.Tensor) -> torch.Tensor:
        grouped = scores.unflatten(-1, (self.groups, -1))  # [tokens, groups, r / groups]
        best = grouped.topk(self.group_size, -1).values.sum(-1).topk(self.top_groups, -1).indices
        allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, best, True)
        return grouped.masked_fill(~allowed[..., None], 0.0 if self.zero_fill else float("-inf")).flatten(-2)

    def select(self, logits: torch.Tensor, k: int, columns: torch.Tensor | None = None) -> torch.Tensor:
        """The k columns [tokens, k] that a router of the experts `columns` (all, if None) chooses; r where none is used."""
        return self.ranking(logits, columns).topk(k).indices

    def weights(self, logits: torch.Tensor, chosen: torch.Tensor, numbers: torch.Tensor | None = None) -> torch.Tensor:
        """Routing weights [tokens, ..., k] of the `chosen` columns when only the columns of `logits` [tokens, n] exist.

        numbers: the experts' own numbers where the columns are fewer (as `chosen`, if None).
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
        """The weights [tokens, shared] that the shared experts have beside the `chosen` ones."""
        weights = self._among_shared(logits, chosen)[:, chosen.shape[1] :] * self.scale
        return (weights * self.expert_scale[0]).to(getattr(torch, self.dtype))

    def _among_shared(self, logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """The shares of the chosen and of the shared experts in the sum of all their sigmoids, [tokens, k + shared]."""
        logs = nn.functional.logsigmoid(torch.cat([logits.gather(1, chosen), logits[:, -self.shared :]], 1))
        return (logs - logs.logsumexp(1, keepdim=True)).exp()

    @property
    def total(self) -> float:
        """What a token's weights and those of the `shared` experts add up to."""
        return self.scale * self.expert_scale[0]

    def _sparsemixer(self, logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Each choice's softmax over the experts close to it among those not chosen before (arXiv 2409.12136)."""
        weights, left = [], logits
        for expert in chosen.split(1, 1):
            best = left.amax(1, keepdim=True)
            far = (best - logits) / logits.abs().clamp(min=best) > 2 * self.jitter
            weights.append(left.masked_fill(far, float("-inf")).softmax(1).gather(1, expert))
            left = left.scatter(1, expert, float("-inf"))
        return torch.cat(weights, 1)


def read_router(entry: dict) -> Router:
    """A router from what JSON keeps of it."""
    return Router(**{name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()})


def _column(values: tuple[float, ...], like: torch.Tensor, numbers: torch.Tensor | None) -> torch.Tensor:
    column = torch.tensor(values, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    return column if numbers is None else column[numbers]


def table_ranking(chosen: torch.Tensor, n: int) -> torch.Tensor:
    """What stands in for a table of token ids when experts are removed, the highest first: float32 [tokens, n].

    A token keeps those of its k table entries e_1..e_k that are kept, in their order. For every one that is not, the next
    kept expert by number steps in that it does not use yet, counted from (e_1 + ... + e_k) mod n on. That follows from the
    token's row alone, so that it can be written into the table of the smaller model, and spreads the token ids of a removed
    expert over the others as evenly as the table spreads them all.
    """
    start, numbers = chosen.sum(1, keepdim=True), torch.arange(n, device=chosen.device)
    own = torch.arange(chosen.shape[1], 0, -1, device=chosen.device).expand_as(chosen)
    return (-((numbers - start) % n)).scatter(1, chosen, own).float()


def pruned_table(table: torch.Tensor, kept: Sequence[int], n: int) -> torch.Tensor:
    """The table [vocabulary, k] of a model that has the experts `kept` alone, by their new numbers."""
    columns = torch.tensor(kept, device=table.device)
    return table_ranking(table.long(), n)[:, columns].topk(table.shape[1]).indices.to(table.dtype)


def unpack(output) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [tokens, n], weights [tokens, k] and indices [tokens, k] out of what a gate returned.

    What it returned beside them, a state for the next layer or weights of shared experts, is left out. Raises ValueError
    when it returned something else.
    """
    if isinstance(output, tuple) and len(output) >= 3 and all(torch.is_tensor(t) and t.ndim == 2 for t in output[:3]):
        return output[:3]
    raise ValueError("it does not return logits, weights and indices")


def all_logits(router: Router, gate: nn.Module, inputs: tuple, logits: torch.Tensor) -> torch.Tensor:
    """The logits that a gate returned for these inputs, and behind them those of shared experts, which it keeps to itself."""
    if not router.shared:
        return logits
    weight = matrix(gate, logits.shape[1] + router.shared).to(logits.device)
    both = nn.functional.linear(inputs[0].reshape(-1, weight.shape[1]).float(), weight.float())
    return torch.cat([logits, both[:, -router.shared :]], 1)


def matrix(gate: nn.Module, rows: int) -> torch.Tensor | None:
    """The gate's own matrix of so many rows, or None."""
    names = (name for name, p in gate.named_parameters(recurse=False) if p.ndim == 2 and p.shape[0] == rows)
    return next((held(gate, name) for name in names), None)


def table(gate: nn.Module) -> str | None:
    """The name of the integers [vocabulary, k] in which a gate looks up the experts of a token id, if it does."""
    return next((name for name, b in gate.named_buffers() if b.ndim == 2 and not b.is_floating_point()), None)


# --- finding out what a router does, by asking it -------------------------------------------------------------------


def per_expert(block: nn.Module, gate: nn.Module, n: int, beside: int = 0) -> Iterator[tuple[nn.Module, str, int]]:
    """The tensors of a router, in its modules and on the block itself, that are indexed by expert: owner, name, axis.

    beside: how many entries more some of them have behind those of the experts.
    """
    for owner, recurse in ((gate, True), (block, False)):
        for module in owner.modules() if recurse else (owner,):
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                axes = [axis for size in (n, n + beside) for axis, there in enumerate(tensor.shape) if there == size]
                if axes and tensor.is_floating_point():
                    yield module, name, axes[0]


@torch.no_grad()
def identify(block: nn.Module, gate: nn.Module, n: int) -> tuple[Router, int]:
    """What a router does, and its k, found by asking it: the kind whose choice and weights equal the gate's on random
    input. Vectors with a number for each expert are shaken meanwhile, which tells what they are for.

    Raises ValueError when no known kind does, with the reason.
    """
    generator = torch.Generator().manual_seed(0)
    weight = next(p for p in gate.parameters() if p.ndim == 2)
    probe = torch.randn(1, 64, weight.shape[1], generator=generator).to(device_of(gate, weight), weight.dtype)
    names = _also_takes(block, gate)
    ids = torch.arange(64, device=probe.device) % (len(held(gate, table(gate))) if table(gate) else 64)
    arguments = [ids[None] if name is None else getattr(block, name) for name in names]
    beside = _beside(gate, _ask(gate, probe, arguments), n)
    places = [(m, name) for m, name, _ in per_expert(block, gate, n, sum(beside)) if _vector(getattr(m, name), n, beside)]
    if beside[0]:
        places += [(gate, name) for name, p in gate.named_parameters(recurse=False) if p.numel() == 1]
    vectors = {number: held(*place) for number, place in enumerate(places)}
    offloaded = any(getattr(*place).is_meta for place in places)

    def shake(held: torch.Tensor) -> torch.Tensor:
        held = held + 0.3 * torch.rand(held.shape, generator=generator).to(held)
        if held.numel() == n + 1:  # no bias may let all choose nothing
            held[-1] = held[:-1].min()
        return held

    with ExitStack() as stack:
        stack.enter_context(_changed([getattr(*place) for place in places], shake))
        states = probe / (spread := _spread(gate, probe, arguments))
        if spread > 1 and (left := _spread(gate, states, arguments)) > 1.5:  # a norm undid it
            matrices = [getattr(m, name) for m, name, _ in per_expert(block, gate, n, sum(beside)) if (m, name) not in places]
            stack.enter_context(_changed(matrices, lambda held: held / left))
        states = states.to(probe.dtype)
        logits, weights, chosen, *more = _ask(gate, states, arguments)
        shaken = [(number, _listed(held(*place), n)) for number, place in enumerate(places)]
        none_first = [(None, None), *shaken]
        # What is not shaken is taken for a bias if it may be one: without it, a small one would go unnoticed.
        biases = [*shaken, (None, None)] if offloaded else none_first
        plain = Router(shared=beside[0], idle=beside[1], table=table(gate) is not None)
        logits = all_logits(plain, gate, (states,), logits)
        if plain.idle:  # the gate names some expert, with no weight, where none is used
            chosen = chosen.masked_fill(weights == 0, n)
            if (chosen == n).all():
                raise ValueError("it uses no expert on random input")
        kind, names = _kind(gate, plain, logits, weights, chosen, none_first, biases)
        if plain.table:
            _check_table(gate, chosen, ids)
        if plain.shared and not torch.equal(kind.shared_weights(logits, chosen), more[0]):
            raise ValueError("it weighs its shared experts in a way not known here")
    return replace(kind, **{field: _listed(vectors[name], n) for field, name in names.items()}), chosen.shape[1]


def _beside(gate: nn.Module, answer: tuple, n: int) -> tuple[int, int]:
    """How many shared experts a gate weighs, and whether it can choose none: by what it returns. Raises ValueError where
    it scores other things."""
    logits, more = answer[0], answer[3:]
    if logits.shape[1] == n and more and torch.is_tensor(more[0]) and more[0].ndim == 2:
        if matrix(gate, n + more[0].shape[1]) is None:
            raise ValueError("it weighs shared experts in a way not known here")
        return more[0].shape[1], 0
    if logits.shape[1] not in (n, n + 1):
        raise ValueError(f"it chooses among {logits.shape[1]} things where there are {n} experts")
    return 0, logits.shape[1] - n


def _vector(tensor: torch.Tensor, n: int, beside: tuple[int, int]) -> bool:
    return tensor.numel() in (n, n + beside[1])


def _listed(vector: torch.Tensor, n: int) -> tuple[float, ...]:
    """The numbers of a vector; that of a scalar for each of n experts."""
    return tuple(vector.flatten().tolist()) * (n if vector.numel() == 1 else 1)


def _check_table(gate: nn.Module, chosen: torch.Tensor, ids: torch.Tensor) -> None:
    rows = held(gate, table(gate)).to(chosen.device)
    if not torch.equal(rows[ids].long(), chosen):
        raise ValueError("it does not choose by its table of token ids alone")
    ordered = rows.sort(1).values
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise ValueError("its table sends token ids to one expert twice: the table is not filled, or was pruned another way")


def held(module: nn.Module, name: str) -> torch.Tensor:
    """A module's tensor, wherever accelerate has put it."""
    tensor = getattr(module, name)
    return module._hf_hook.weights_map[name] if tensor.is_meta else tensor


def _also_takes(block: nn.Module, gate: nn.Module) -> list[str | None]:
    """The names of what a gate is given beside the hidden states: attributes of the block; None for the token ids.

    What it can do without, such as a state of the layer before, it is not given. Raises ValueError for anything else.
    """
    parameters = list(inspect.signature(gate.forward).parameters.values())[1:]
    asked = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and (hasattr(block, p.name) or p.default is p.empty)]
    for p in asked:
        if not hasattr(block, p.name) and (p.name != "input_ids" or table(gate) is None):
            raise ValueError(f"it chooses by {p.name!r} as well, not by the hidden states alone")
    return [p.name if hasattr(block, p.name) else None for p in asked]


def device_of(module: nn.Module, weight: torch.Tensor) -> torch.device:
    """Where a module with this weight computes: offloaded weights lie on "meta" until its hook brings them."""
    return torch.device(module._hf_hook.execution_device) if weight.is_meta and hasattr(module, "_hf_hook") else weight.device


def _ask(gate: nn.Module, probe: torch.Tensor, arguments: list) -> tuple[torch.Tensor, ...]:
    """A gate's answer to [1, tokens, d], or to [tokens, d], as the block of some families passes it; hooks do not hear it."""
    for states, last in ((probe, False), (probe[0], True)):
        try:
            answer = gate.forward(states, *arguments)
            return (*unpack(answer), *answer[3:])
        except (TypeError, RuntimeError, IndexError, ValueError) as error:
            if last:
                raise ValueError(str(error).split("\n")[0]) from None


def _spread(gate: nn.Module, probe: torch.Tensor, arguments: list) -> torch.Tensor:
    """The deviation of the logits: far apart, they would make all kinds look alike."""
    return _ask(gate, probe, arguments)[0].float().std().clamp(min=1e-3)


@contextmanager
def _changed(tensors: Sequence[torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """These tensors changed, where they are held, and as they were afterwards."""
    former = [(tensor, tensor.clone()) for tensor in tensors if not tensor.is_meta]
    try:
        for tensor, values in former:
            tensor.copy_(change(values))
        yield
    finally:
        for tensor, values in former:
            tensor.copy_(values)


def _kind(gate, plain: Router, logits, weights, chosen, scales: list, biases: list) -> tuple[Router, dict[str, int]]:
    """The kind that explains weights and choice, and which vector is its `bias` and its `expert_scale`, by name."""
    for kind, names in _weighing(gate, plain, logits, weights, chosen, scales):
        if kind.table:  # which no logits choose
            return kind, names
        for ranked, more in _choosing(gate, kind, biases):
            ranking = ranked.ranking(logits)
            best = ranking.topk(chosen.shape[1]).values.sort(1).values
            if torch.equal(ranking.gather(1, chosen).sort(1).values, best):  # by value: ties may go either way
                return ranked, names | more
    raise ValueError("it computes its routing weights or its choice in a way not known here")


def _weighing(gate, plain: Router, logits, weights, chosen, scales: list) -> Iterator[tuple[Router, dict[str, int]]]:
    """Kinds that give exactly these weights to these choices."""
    dtype, k = str(weights.dtype).removeprefix("torch."), weights.shape[1]
    numbers = {v for v in vars(gate).values() if isinstance(v, int | float) and not isinstance(v, bool) and v > 0}
    kinds = [replace(plain, score=score, wide=wide, dtype=dtype) for wide in (True, False) for score in SCORES]
    kinds += [replace(plain, score=SPARSEMIXER, wide=False, dtype=dtype, jitter=number) for number in numbers]
    if plain.shared:
        kinds = [replace(plain, score="sigmoid", dtype=dtype)]
    for kind in (replace(kind, renormalise=flag) for flag in (True, False) for kind in kinds):
        for name, values in scales:
            scaled = replace(kind, expert_scale=values)
            used = chosen < logits.shape[1] - plain.idle
            ratio = (weights / scaled.weights(logits, chosen))[used].double().median().item()
            for scale in sorted({1.0, 1 / k, *numbers}, key=lambda s: abs(s - ratio))[:1]:
                for eps in (0.0, 1e-6, *(number for number in numbers if number < 1e-2)) if kind.renormalise else (0.0,):
                    found = replace(scaled, scale=scale, eps=eps)
                    if torch.equal(found.weights(logits, chosen)[used], weights[used]):
                        yield found, {} if name is None else {"expert_scale": name}


def _choosing(gate, kind: Router, biases: list) -> Iterator[tuple[Router, dict[str, int]]]:
    """The kind with every way of choosing that its gate could have."""
    number = lambda *names: next((v for n in names if isinstance(v := getattr(gate, n, None), int)), 1)  # noqa: E731
    groups, top = number("num_group", "n_group"), number("topk_group")
    for by_logits in (False, True):
        for name, values in biases:
            plain = replace(kind, by_logits=by_logits, bias=values)
            named = {} if name is None else {"bias": name}
            yield plain, named
            if groups > 1:
                for size in (2, 1):
                    for zero in (False, True):
                        grouped = {"groups": groups, "top_groups": top, "group_size": size, "zero_fill": zero}
                        yield replace(plain, **grouped), named


# --- skipping -------------------------------------------------------------------------------------------------------


def skip_ratios(weights: torch.Tensor) -> torch.Tensor:
    """rho of the pairs 2..k: the tail's weight over the head's, (w_j + ... + w_k) / (w_1 + ... + w_{j-1}).

    `weights` [tokens, k] in falling order; returns [tokens, k - 1], falling as well. For k = 2 it is w_2 / w_1 (paper,
    Section 3.3); for k > 2 the tail rule of A.2 with its own beta = H / (D - H).
    """
    weights = weights.float() if weights.dtype in (torch.bfloat16, torch.float16) else weights
    if weights.shape[1] == 2:  # the same numbers in one step: decoding counts them
        return weights[:, 1:] / weights[:, :1]
    tails = weights.flip(1).cumsum(1).flip(1)[:, 1:]
    heads = weights.cumsum(1)[:, :-1]
    return tails / heads


def skip_pairs(weights: torch.Tensor, beta: float | torch.Tensor, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Which pairs stay, and the routing weights after skipping; both [tokens, k] like `weights`, which fall.

    A pair j >= 2 is dropped when its ratio is below beta: its weight becomes 0. What stays is rescaled to the token's
    former sum where the router renormalises; the factor is computed first, so that nothing dropped changes no bit.
    """
    first = torch.ones_like(weights[:, :1], dtype=torch.bool)
    keep = torch.cat([first, skip_ratios(weights) >= beta], 1)
    kept = weights * keep
    if renormalise:
        kept = kept * (weights.sum(1, keepdim=True) / kept.sum(1, keepdim=True))
    return keep, kept
