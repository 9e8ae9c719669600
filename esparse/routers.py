"""Router kinds and the arithmetic of routing weights: selection, renormalisation, and which pairs skipping drops."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
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

    @property
    def local(self) -> bool:
        """Whether fewer experts rank in the order that all have: then a token's reach is known beforehand."""
        return self.groups == 1 and not (self.bias and self.score == "softmax" and not self.by_logits)

    @property
    def normalises(self) -> bool:
        """Whether the weights of a token add up to the same whatever was chosen: skipping then keeps their sum."""
        return self.renormalise or self.score == SCORES[1]

    @property
    def by_choice(self) -> bool:
        """Whether weights follow from the chosen experts alone (those of a renormalised softmax: but for rounding)."""
        return self.local and self.score != SPARSEMIXER and (self.score != "softmax" or (self.renormalise and not self.eps))

    @property
    def of_chosen(self) -> "Router":
        """The router that gives, where `by_choice`, the same weights but for rounding from the chosen experts' logits alone."""
        return replace(self, score=SCORES[1], renormalise=False) if self.score == "softmax" else self

    @property
    def sorted(self) -> bool:
        """Whether the order of selection is that of falling weights."""
        return not (self.bias or self.expert_scale or self.score == SPARSEMIXER)

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
        """What the experts are chosen by, the highest first: [tokens, r], for all or the experts `columns` [r]."""
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
        """The k columns [tokens, k] that a router of the experts `columns` (all, if None) chooses."""
        return self.ranking(logits, columns).topk(k).indices

    def weights(self, logits: torch.Tensor, chosen: torch.Tensor, numbers: torch.Tensor | None = None) -> torch.Tensor:
        """Routing weights [tokens, ..., k] of the `chosen` columns when only the columns of `logits` [tokens, n] exist.

        numbers: the experts' own numbers where the columns are fewer (as `chosen`, if None).
        """
        if self.score == SPARSEMIXER:
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


def unpack(output) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [tokens, n], weights [tokens, k] and indices [tokens, k] out of what a gate returned.

    Raises ValueError when it returned something else.
    """
    if isinstance(output, tuple) and len(output) == 3 and all(torch.is_tensor(t) and t.ndim == 2 for t in output):
        return output
    raise ValueError(
        "it does not return logits, weights and indices alone: a state for the next layer, "
        "or weights of shared experts, pass through it as well"
    )


# --- finding out what a router does, by asking it -------------------------------------------------------------------


def per_expert(block: nn.Module, gate: nn.Module, n: int) -> Iterator[tuple[nn.Module, str, int]]:
    """The tensors of a router, in its modules and on the block itself, that are indexed by expert: owner, name, axis."""
    for owner, recurse in ((gate, True), (block, False)):
        for module in owner.modules() if recurse else (owner,):
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if n in tensor.shape:
                    yield module, name, list(tensor.shape).index(n)


@torch.no_grad()
def identify(block: nn.Module, gate: nn.Module, n: int) -> tuple[Router, int]:
    """What a router does, and its k, found by asking it: the kind whose choice and weights equal the gate's on random
    input. Vectors with a number for each expert are shaken meanwhile, which tells what they are for.

    Raises ValueError when no known kind does, with the reason.
    """
    try:
        arguments = [getattr(block, name) for name in _also_takes(gate)]
    except AttributeError as error:
        raise ValueError(f"it chooses by {error.name!r} as well, not by the hidden states alone") from None
    weight = next(p for p in gate.parameters() if p.ndim == 2)
    places = [(m, name) for m, name, _ in per_expert(block, gate, n) if getattr(m, name).numel() == n]
    vectors = {number: held(*place) for number, place in enumerate(places)}
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, 64, weight.shape[1], generator=generator).to(device_of(gate, weight), weight.dtype)
    offloaded = any(getattr(*place).is_meta for place in places)
    with _shaken([getattr(*place) for place in places], generator):
        spread = _ask(gate, probe, arguments)[0].float().std()  # logits far apart would make all kinds look alike
        logits, weights, chosen = _ask(gate, (probe / spread.clamp(min=1e-3)).to(probe.dtype), arguments)
        if logits.shape[1] != n:
            raise ValueError(f"it chooses among {logits.shape[1]} things where there are {n} experts")
        shaken = [(number, tuple(held(*place).flatten().tolist())) for number, place in enumerate(places)]
        none_first = [(None, None), *shaken]
        # What is not shaken is taken for a bias if it may be one: without it, a small one would go unnoticed.
        biases = [*shaken, (None, None)] if offloaded else none_first
        kind, names = _kind(gate, logits, weights, chosen, none_first, biases)
    return replace(kind, **{field: tuple(vectors[name].flatten().tolist()) for field, name in names.items()}), chosen.shape[1]


def held(module: nn.Module, name: str) -> torch.Tensor:
    """A module's tensor, wherever accelerate has put it."""
    tensor = getattr(module, name)
    return module._hf_hook.weights_map[name] if tensor.is_meta else tensor


def _also_takes(gate: nn.Module) -> list[str]:
    """The names of what a gate is given beside the hidden states."""
    parameters = list(inspect.signature(gate.forward).parameters.values())[1:]
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def device_of(module: nn.Module, weight: torch.Tensor) -> torch.device:
    """Where a module with this weight computes: offloaded weights lie on "meta" until its hook brings them."""
    return torch.device(module._hf_hook.execution_device) if weight.is_meta and hasattr(module, "_hf_hook") else weight.device


def _ask(gate: nn.Module, probe: torch.Tensor, arguments: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A gate's answer to [1, tokens, d], or to [tokens, d], as the block of some families passes it; hooks do not hear it."""
    for states, last in ((probe, False), (probe[0], True)):
        try:
            return unpack(gate.forward(states, *arguments))
        except (TypeError, RuntimeError, IndexError, ValueError) as error:
            if last:
                raise ValueError(str(error).split("\n")[0]) from None


@contextmanager
def _shaken(vectors, generator: torch.Generator) -> Iterator[None]:
    """These tensors with random numbers added, and as they were afterwards."""
    former = [(vector, vector.clone()) for vector in vectors if not vector.is_meta]
    try:
        for vector, _ in former:
            vector += 0.3 * torch.rand(vector.shape, generator=generator).to(vector)
        yield
    finally:
        for vector, values in former:
            vector.copy_(values)


def _kind(gate, logits, weights, chosen, scales: list, biases: list) -> tuple[Router, dict[str, int]]:
    """The kind that explains weights and choice, and which vector is its `bias` and its `expert_scale`, by name."""
    for kind, names in _weighing(gate, logits, weights, chosen, scales):
        for ranked, more in _choosing(gate, kind, biases):
            ranking = ranked.ranking(logits)
            best = ranking.topk(chosen.shape[1]).values.sort(1).values
            if torch.equal(ranking.gather(1, chosen).sort(1).values, best):  # by value: ties may go either way
                return ranked, names | more
    raise ValueError("it computes its routing weights or its choice in a way not known here")


def _weighing(gate, logits, weights, chosen, scales: list) -> Iterator[tuple[Router, dict[str, int]]]:
    """Kinds that give exactly these weights to these choices."""
    dtype, k = str(weights.dtype).removeprefix("torch."), weights.shape[1]
    numbers = {v for v in vars(gate).values() if isinstance(v, int | float) and not isinstance(v, bool) and v > 0}
    kinds = [Router(score, wide, dtype=dtype) for wide in (True, False) for score in SCORES]
    kinds += [Router(SPARSEMIXER, False, dtype=dtype, jitter=number) for number in numbers]
    for kind in (replace(kind, renormalise=flag) for flag in (True, False) for kind in kinds):
        for name, values in scales:
            plain = replace(kind, expert_scale=values)
            ratio = (weights / plain.weights(logits, chosen)).double().median().item()
            for scale in sorted({1.0, 1 / k, *numbers}, key=lambda s: abs(s - ratio))[:1]:
                for eps in (0.0, 1e-6, *(number for number in numbers if number < 1e-2)) if kind.renormalise else (0.0,):
                    found = replace(plain, scale=scale, eps=eps)
                    if torch.equal(found.weights(logits, chosen), weights):
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
