"""Winning back what pruning cost (Table 4), rung by rung: closed-form scales, a choice among close subsets by what the
whole model gives out, and three ways to train: the routers alone, expert by expert after the full model, everything."""

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from .experts import pair_outputs
from .models import (
    MoELayer,
    check_fingerprint,
    check_held,
    check_tokens,
    evaluating,
    experts_implementation,
    input_device,
    modes_kept,
    moe_layers,
)
from .processes import ranks, summed
from .pruning import PruningPlan, masked
from .search import ranked, subset_losses
from .traces import LayerTrace, Trace, full_gram, part
from .weights import restore_zeros, zeros

RUNGS = ("router", "experts", "tune")
# Section 4.2 and A.7 of the paper: MetaMathQA on 16 GPUs; the batch it used is not printed.
PAPER = {"steps": 900, "learning_rate": 2e-5, "schedule": "cosine"}
ROUNDING = 1e-9  # of squares, below which two experts say the same
ROWS = 4096  # tokens whose Gram is unpacked at once


# --- closed-form scales ---------------------------------------------------------------------------------------------


def expert_scales(layer: LayerTrace, kept: Sequence[int]) -> torch.Tensor:
    """Factors s, float64 [r], of the kept experts' outputs that minimise sum_t ||sum_i s_i w_i f_i - z||^2 on the trace.

    The normal equations are r x r: A_ij = sum_t w_i w_j <f_i, f_j>, b_i = sum_t w_i <f_i, z>. Solved for s - 1 by the
    pseudo-inverse, so that an expert no token uses keeps its scale. Raises ValueError for subsets outside the trace.
    """
    kept = layer.check(kept)
    column = torch.zeros(layer.n + 1, dtype=torch.long, device=layer.order.device)
    column[kept] = torch.arange(len(kept), device=column.device)
    system = torch.zeros(len(kept), len(kept), dtype=torch.float64, device=column.device)
    target = torch.zeros(len(kept), dtype=torch.float64, device=column.device)
    for start in range(0, len(layer.order), ROWS):
        some = part(layer, slice(start, start + ROWS))
        positions, weights = some.routing(kept)  # [tokens, k]
        at, weights = column[some.order.gather(1, positions)], weights.double()
        gram = full_gram(some).double().gather(1, positions[:, :, None].expand(-1, -1, some.order.shape[1]))  # [tokens, k, m]
        inner = gram.gather(2, positions[:, None, :].expand(-1, some.k, -1))  # [tokens, k, k]
        pairs = weights[:, :, None] * inner * weights[:, None, :]
        system.index_put_((at[:, :, None].expand_as(pairs), at[:, None, :].expand_as(pairs)), pairs, accumulate=True)
        if some.target_dot is None:
            toward = (gram[:, :, : some.k] @ some.weights.double()[:, :, None]).squeeze(2)  # <f_i, z>, z the layer's own output
        else:
            toward = some.target_dot.double().gather(1, positions)
        if some.router.shared:  # what the shared experts add otherwise than in z
            before = some.weights.double().sum(1) if some.target_dot is None else some.router.total
            toward = toward - gram[:, :, -1] * (before - weights.sum(1))[:, None]
        target.index_put_((at,), weights * toward, accumulate=True)
    system, target = layer.together(system), layer.together(target)
    return 1 + torch.linalg.pinv(system, hermitian=True) @ (target - system.sum(1))


@torch.no_grad()
def scale_experts(model, trace: Trace, plan: PruningPlan) -> list[list[float]]:
    """Fold the closed-form scales into the experts of a model pruned to `plan`, in place; returns them, [layers][r].

    trace: of the full model, that the plan was made from. Raises ValueError where the model is not pruned to the plan, the
    trace belongs to another model, a norm follows the experts' last map, which no scale of it can pass, or experts are
    offloaded.
    """
    layers = moe_layers(model)
    if trace.model != plan.model:
        raise ValueError("This trace was made with another model than the pruning plan: trace the model the plan is for.")
    if len(layers) != len(plan.kept) or any(layer.n != plan.r for layer in layers):
        raise ValueError(f"The model is not pruned to this plan: its layers must have {plan.r} experts; call prune first.")
    if any(getattr(layer.experts, "has_post_expert_norm", False) for layer in layers):
        raise ValueError("A norm follows the experts of this model: scaling their outputs changes nothing.")
    check_held((layer.experts for layer in layers), "load the pruned model without offloading")
    scales = [expert_scales(traced, kept) for traced, kept in zip(trace.layers, plan.kept, strict=True)]
    for layer, scale in zip(layers, scales, strict=True):
        for name in ("down_proj", "down_proj_bias") if layer.experts.has_bias else ("down_proj",):
            weight = getattr(layer.experts, name)
            weight.mul_(scale.to(weight).view(-1, *[1] * (weight.ndim - 1)))
    return [scale.tolist() for scale in scales]


# --- a choice by what the whole model gives out ---------------------------------------------------------------------


def divergence(model, tokens: torch.Tensor, expected: Sequence[torch.Tensor], batch_size: int = 8) -> float:
    """Mean KL(expected || model) of next-token distributions, in nats, on tokens [sequences, length]."""
    total = 0.0
    for batch, before in zip(tokens.split(batch_size), expected, strict=True):
        logits = _run(model, batch).logits
        total += _kl(before.to(logits.device).float(), logits).item()
    return total / tokens.numel()


def _kl(expected: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The sum over positions of KL between log-probabilities [..., vocabulary] and a model's logits."""
    return nn.functional.kl_div(logits.float().log_softmax(-1), expected, log_target=True, reduction="sum")


@torch.no_grad()
def choose_by_output(
    model, trace: Trace, r: int, tokens: torch.Tensor, *, candidates: int = 4, batch_size: int = 8
) -> tuple[PruningPlan, dict]:
    """The plan that takes, layer after layer, that of each layer's best few subsets after which the whole model says most
    nearly what the full one says; beside it the mean KL before and after.

    A layer's loss is not the model's quality: this asks the model, on a small validation split [sequences, length] that
    shares nothing with the calibration set. candidates: subsets of each layer, by their reconstruction loss. Raises
    ValueError as `subset_losses`, and for a trace of another model.
    """
    check_tokens(model, tokens)
    check_fingerprint(model, trace.model, "trace")
    with evaluating(model):
        expected = [_run(model, batch).logits.float().log_softmax(-1).cpu() for batch in tokens.split(batch_size)]
    close = []
    for layer in trace.layers:
        subsets, losses = subset_losses(layer, r)
        close.append([(list(subsets[i]), losses[i].item()) for i in ranked(losses)[:candidates].tolist()])

    def plan_of(chosen: list[int]) -> PruningPlan:
        kept, losses = zip(*(options[i] for options, i in zip(close, chosen, strict=True)), strict=True)
        return PruningPlan("output", r, list(kept), list(losses), trace.model, trace.tokens)

    def ask(chosen: list[int]) -> float:
        with evaluating(model), masked(model, plan_of(chosen)):
            return divergence(model, tokens, expected, batch_size)

    chosen = [0] * len(close)
    before = best = ask(chosen)
    for number, options in enumerate(tqdm(close, desc="choose by output", unit="layer")):
        for candidate in range(1, len(options)):
            tried = [*chosen[:number], candidate, *chosen[number + 1 :]]
            if (found := ask(tried)) < best * (1 - 1e-6):  # else the subset of less loss stays
                chosen, best = tried, found
    return plan_of(chosen), {"before": before, "after": best}


# --- training -------------------------------------------------------------------------------------------------------


def recover(
    model,
    tokens: torch.Tensor,
    rung: str,
    *,
    teacher=None,
    plan: PruningPlan | None = None,
    steps: int = 100,
    learning_rate: float = PAPER["learning_rate"],
    schedule: str = PAPER["schedule"],
    batch_size: int = 8,
    seed: int = 42,
    folder: str | Path | None = None,
    **arguments,
) -> dict:
    """Train a pruned model in place with transformers' Trainer, whatever accelerate or FSDP2 set-up it finds itself in.

        esparse.recover(pruned, tokens, "experts", teacher=full, plan=plan, steps=300, learning_rate=1e-3)

    tokens: [sequences, length], packed text, gone through again and again. rung: "router" trains the routers alone towards
    the teacher's next-token distributions (KL); "experts" everything, by L_CE + lambda * the sum over layers and experts of
    the mean squared difference between the outputs of the teacher's experts and their counterparts in the student, both
    models fed the same tokens and each expert those that the teacher routes to it; lambda is L_CE over that sum in the
    first batch of all processes (MoE-Pruner, arXiv 2410.12013); "tune" everything, by next-token cross-entropy. Nothing is
    added to these, such as the balance loss that a config may ask for. plan: which of the teacher's experts the student has,
    where it has fewer. Weights that are zero stay so; half-precision weights, in
    which a step of the paper's size is lost in rounding, are trained as float32 and rounded at the end. arguments: further
    `TrainingArguments`.
    Returns {"rung", "steps", "seconds", "trained": parameters, "losses": of each step, "balance": lambda or None}.
    Raises ValueError for an unknown rung, a missing teacher, models whose layers do not match, a model (for "experts" also a
    teacher) that is offloaded, and under FSDP for other rungs than "tune" and for its first version.
    """
    if rung not in RUNGS:
        raise ValueError(f"Unknown rung {rung!r}: choose from {', '.join(RUNGS)}.")
    if rung != "tune" and under_fsdp():
        raise ValueError("Under FSDP no process holds a whole teacher: take the rung 'tune', or DDP by torchrun.")
    if under_fsdp() and os.environ.get("FSDP_VERSION") != "2":  # the first makes vectors of matrices: zeros would be lost
        raise ValueError("Pruned weights stay zero under FSDP's second version alone: launch with --fsdp_version 2.")
    check_tokens(model, tokens)
    check_held([model], "load it whole, or train it in shards, by `accelerate launch -m esparse recover`")
    if rung != "tune":
        check_teacher(model, teacher, plan, rung)
    layers = moe_layers(model)
    wanted = [p for layer in layers for p in layer.gate.parameters()] if rung == "router" else list(model.parameters())
    wanted = [p for p in wanted if p.requires_grad]  # a bias that balances the load is learnt otherwise
    with ExitStack() as stack:
        stack.enter_context(_training(model, wanted))
        if teacher is not None:
            stack.enter_context(evaluating(teacher))
        if not under_fsdp():  # which does it shard by shard
            stack.enter_context(_in_float32(model))
        if model.dtype in (torch.float32, torch.bfloat16):  # which the grouped product knows
            stack.enter_context(experts_implementation(layers, "grouped_mm"))
        place = folder or stack.enter_context(tempfile.TemporaryDirectory())
        options = {"max_steps": steps, "learning_rate": learning_rate, "lr_scheduler_type": schedule, "seed": seed}
        options |= {"per_device_train_batch_size": batch_size, "output_dir": str(place), **arguments}
        trainer = _trainer(model, tokens, options, _LOSSES[rung](model, teacher, plan))
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trained = sum(p.numel() for p in wanted)
    return {"rung": rung, "steps": steps, "seconds": seconds, "trained": trained, "losses": losses} | {
        "balance": getattr(trainer.measure, "balance", None)
    }


def under_fsdp() -> bool:
    """Whether `accelerate launch` asked for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


@contextmanager
def _in_float32(model) -> Iterator[None]:
    """Half-precision parameters as float32, and on leaving in their own dtype again."""
    half = [(p, p.dtype) for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)]
    for parameter, _ in half:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in half:
            parameter.data = parameter.data.to(dtype)


def gathered(model) -> dict[str, torch.Tensor] | None:
    """All weights of a model whose parameters FSDP has shared out, on the CPU of the first process (elsewhere empty), to be
    loaded into a whole model; None where there are no shards. Every process must call it."""
    if not any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: tensor for name, tensor in state.items() if name not in model.all_tied_weights_keys}


def check_teacher(model, teacher, plan: PruningPlan | None, rung: str) -> None:
    """ValueError unless the teacher's layers match the model's, expert by expert or through the plan, which must be its."""
    if teacher is None:
        raise ValueError(f"The rung {rung!r} learns from the full model: give it as teacher=.")
    one, other = moe_layers(model), moe_layers(teacher)
    if rung == "experts":
        check_held([layer.experts for layer in other], "load the teacher whole, or take the rung 'router'")
    if len(one) != len(other):
        raise ValueError(f"The layers do not match: the teacher has {len(other)} MoE layers, the student {len(one)}.")
    if plan and len(plan.kept) != len(one):
        raise ValueError(f"The pruning plan is for {len(plan.kept)} MoE layers, the models have {len(one)}.")
    if model.config.get_text_config().vocab_size != teacher.config.get_text_config().vocab_size:
        raise ValueError("The teacher has another vocabulary than the student: they cannot be fed the same tokens.")
    for number, (mine, theirs) in enumerate(zip(one, other, strict=True)):
        kept = plan.kept[number] if plan else list(range(theirs.n))
        if len(kept) != mine.n or kept[-1] >= theirs.n:
            raise ValueError(
                f"The layers do not match: {mine.name} has {mine.n} experts, the teacher {theirs.n}"
                + (f", and the plan keeps {len(kept)}." if plan else ": give the pruning plan that says which are left.")
            )
        if mine.experts.down_proj.shape[1:] != theirs.experts.down_proj.shape[1:]:
            raise ValueError(f"The layers do not match: the experts of {mine.name} are of another shape than the teacher's.")
    if plan:
        check_fingerprint(teacher, plan.model, "pruning plan")


@contextmanager
def _training(model, wanted: Sequence[nn.Parameter]) -> Iterator[None]:
    """The model in training mode with these parameters to learn, and as it was before on leaving."""
    former = {id(p): p.requires_grad for p in model.parameters()}
    chosen = {id(p) for p in wanted}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        with modes_kept(model):
            yield
    finally:
        model.zero_grad(set_to_none=True)
        for parameter in model.parameters():
            parameter.requires_grad_(former.get(id(parameter), True))


def _trainer(model, tokens: torch.Tensor, options: dict, measure):
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Watch(TrainerCallback):
        """Zeros stay, and a bar shows how far it is."""

        def on_train_begin(self, args, state, control, model=None, **_):
            self.present = zeros(model)
            self.bar = tqdm(total=args.max_steps, desc="recover", unit="step", disable=not state.is_world_process_zero)

        def on_optimizer_step(self, args, state, control, model=None, **_):
            restore_zeros(model, self.present)
            self.bar.update()

        def on_train_end(self, *_, **__):
            self.bar.close()

    class Recovery(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, output = self.measure(model, inputs)
            return (loss, output) if return_outputs else loss

    quiet = {"save_strategy": "no", "report_to": "none", "logging_steps": 1, "disable_tqdm": True, "log_level": "error"}
    quiet |= {"dataloader_pin_memory": torch.cuda.is_available(), "ddp_find_unused_parameters": False}
    rows = [{"input_ids": row} for row in tokens]
    trainer = Recovery(model, TrainingArguments(**quiet | options), train_dataset=rows, callbacks=[Watch()])
    trainer.remove_callback(PrinterCallback)
    trainer.model_accepts_loss_kwargs = False  # a mean over each batch, whatever is accumulated
    trainer.measure = measure
    return trainer


class _Tune:
    """L_CE, the mean next-token cross-entropy."""

    def __init__(self, model, teacher, plan):
        pass

    def __call__(self, model, inputs) -> tuple[torch.Tensor, object]:
        output = model(**inputs, use_cache=False)
        return _cross_entropy(output.logits, inputs["input_ids"]), output


class _Router:
    """KL(teacher || student), the mean over tokens."""

    def __init__(self, model, teacher, plan):
        self.teacher = teacher

    def __call__(self, model, inputs) -> tuple[torch.Tensor, object]:
        ids = inputs["input_ids"]
        with torch.no_grad():
            expected = _on(self.teacher, ids).logits.float().log_softmax(-1).to(ids.device)
        output = model(input_ids=ids, use_cache=False)
        return _kl(expected, output.logits) / ids.numel(), output


class _Experts:
    """L_CE + balance * the experts' sum, see `recover`."""

    def __init__(self, model, teacher, plan):
        self.teacher, self.balance = teacher, None
        self.layers, self.theirs = moe_layers(model), moe_layers(teacher)
        self.kept = plan.kept if plan else [list(range(layer.n)) for layer in self.theirs]

    def __call__(self, model, inputs) -> tuple[torch.Tensor, object]:
        with torch.no_grad(), entering(self.theirs) as before:
            _on(self.teacher, inputs["input_ids"])
        with entering(self.layers) as now:
            output = model(**inputs, use_cache=False)
        loss = _cross_entropy(output.logits, inputs["input_ids"])
        pairs = zip(self.layers, self.theirs, now, before, self.kept, strict=True)
        apart = torch.stack([expert_differences(*pair).sum() for pair in pairs]).sum()
        if self.balance is None:
            if apart <= ROUNDING * sum(states.float().square().mean() for states, _ in before):
                raise ValueError("The student's experts give just what the teacher's give: there is nothing to distil.")
            self.balance = (_mean(loss) / _mean(apart)).item()
        return loss + self.balance * apart, output


_LOSSES = {"tune": _Tune, "router": _Router, "experts": _Experts}


def _cross_entropy(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The mean next-token cross-entropy alone: a model's own loss holds what its config adds."""
    return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def _mean(loss: torch.Tensor) -> torch.Tensor:
    """A loss, as the mean over all processes."""
    return summed(loss.detach().clone()) / ranks()


def _on(model, ids: torch.Tensor):
    if model.device != ids.device and not hasattr(model, "hf_device_map"):
        model.to(ids.device)
    return _run(model, ids)


def _run(model, ids: torch.Tensor):
    return model(ids.to(input_device(model)), use_cache=False)


@contextmanager
def entering(layers: Sequence[MoELayer]) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Hidden states [tokens, d] and chosen experts [tokens, k] of each layer's experts in a forward pass."""
    seen: list = [None] * len(layers)

    def hear(number: int):
        def hook(_module, inputs, named) -> None:
            given = dict(zip(("hidden_states", "top_k_index"), inputs, strict=False)) | named
            seen[number] = (given["hidden_states"], given["top_k_index"])

        return hook

    handles = [layer.experts.register_forward_pre_hook(hear(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def expert_differences(student: MoELayer, teacher: MoELayer, now, before, kept: Sequence[int]) -> torch.Tensor:
    """MSE(teacher's expert, student's) for each kept expert, float32 [r], over the tokens the teacher routes to it.

    now, before: what `entering` heard of the student and of the teacher on the same tokens.
    """
    (mine, _), (theirs, chosen) = now, before
    place = torch.full((teacher.n,), student.n, device=chosen.device)
    place[torch.tensor(kept, device=chosen.device)] = torch.arange(student.n, device=chosen.device)
    counterpart = place[chosen]  # [tokens, k], student.n where the student lacks it
    with torch.no_grad():
        wanted = pair_outputs(teacher.experts, theirs, chosen.masked_fill(counterpart == student.n, teacher.n))
    given = pair_outputs(student.experts, mine, counterpart.to(mine.device))
    apart = (given.float() - wanted.to(given.device).float()).square().mean(-1).flatten()  # [tokens * k]
    sums = apart.new_zeros(student.n + 1).index_add(0, counterpart.flatten(), apart)
    counts = torch.bincount(counterpart.flatten(), minlength=student.n + 1)
    return (sums / counts.clamp(min=1))[: student.n]
