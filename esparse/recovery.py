"""Recover quality after pruning (Table 4): closed-form scales, and three ways to train: the routers alone, everything
with expert-wise distillation, and everything by cross-entropy."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from .checkpoints.by_output import kl
from .checkpoints.models import load_model, save_model
from .corpora import calibration_tokens
from .files import refuse_existing
from .machine import is_first, ranks, seconds_of, summed
from .moe.experts import pair_outputs
from .moe.identity import check_fingerprint
from .moe.layers import MoELayer, experts_implementation, moe_layers
from .moe.running import check_held, check_tokens, evaluating, input_device, temporarily
from .pruning.plan import PruningPlan
from .pruning.weights import restore_zeros, zeros
from .tracing.losses import expert_scales
from .tracing.trace import Trace

TRAINED_METHODS = ("router", "experts", "tune")
# Section 4.2 and A.7 of the paper: MetaMathQA on 16 GPUs; it does not state the batch size.
PAPER = {"steps": 900, "learning_rate": 2e-5, "schedule": "cosine"}
ROUNDING = 1e-9  # ratio of squares below which two experts count as equal


@torch.no_grad()
def scale_experts(model, trace: Trace, plan: PruningPlan) -> list[list[float]]:
    """Fold closed-form scales into the experts of a model pruned to `plan`, in place. Returns the scales, [layers][r].

    trace: the full model's, from which the plan was made. Raises ValueError if the model is not pruned to the plan, the
    trace belongs to another model, a norm after the experts' last map undoes scales, or experts are offloaded.
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


def _forward(model, ids: torch.Tensor):
    return model(ids.to(input_device(model)), use_cache=False)


def recover(
    model,
    tokens: torch.Tensor,
    method: str | None = None,
    *,
    rung: str | None = None,
    teacher=None,
    plan: PruningPlan | None = None,
    steps: int = 100,
    learning_rate: float = PAPER["learning_rate"],
    schedule: str = PAPER["schedule"],
    batch_size: int = 8,
    seed: int = 42,
    **arguments,
) -> dict:
    """Train a pruned model in place with transformers' Trainer, under any accelerate or FSDP2 set-up.

        esparse.recover(pruned, tokens, "experts", teacher=full, plan=plan, steps=300, learning_rate=1e-3)

    tokens: packed text [sequences, length], repeated as often as needed. method (formerly `rung`): "router" trains only
    the routers, by the KL from the teacher's next-token distributions. "experts" trains everything by L_CE + lambda * S. S
    sums, over layers and experts, the mean squared difference between the outputs of a student's expert and its teacher's
    expert. Both models get the same tokens, each expert those that the teacher routes to it. lambda is L_CE / S in the
    first batch of all processes (MoE-Pruner, arXiv 2410.12013). "tune" trains everything by next-token cross-entropy. A
    balance loss in the config is not added. plan: the teacher's experts that the student has, if fewer. arguments: further
    `TrainingArguments`.

    Zero weights stay zero. Half-precision weights are trained as float32 and rounded at the end, since rounding each step
    would lose updates of the paper's size. Returns {"method", "steps", "seconds", "trained": number of parameters,
    "losses": of each step, "balance": lambda or None}. Raises ValueError for an unknown method, a missing teacher, models
    whose layers do not match, an offloaded model (for "experts" also teacher), and under FSDP for any method but "tune"
    and for FSDP's first version.
    """
    method = method or rung
    if method not in TRAINED_METHODS:
        raise ValueError(f"Unknown method {method!r}: choose from {', '.join(TRAINED_METHODS)}.")
    if method != "tune" and under_fsdp():
        raise ValueError("Under FSDP no process holds a whole teacher: take the method 'tune', or DDP by torchrun.")
    if under_fsdp() and os.environ.get("FSDP_VERSION") != "2":  # FSDP1 flattens matrices to vectors: zeros would be lost
        raise ValueError("Pruned weights stay zero under FSDP's second version alone: launch with --fsdp_version 2.")
    check_tokens(model, tokens)
    check_held([model], "load it whole, or train it in shards, by `accelerate launch -m esparse recover`")
    if method != "tune":
        _check_teacher(model, teacher, plan, method)
    layers = moe_layers(model)
    wanted = [p for layer in layers for p in layer.gate.parameters()] if method == "router" else list(model.parameters())
    wanted = [p for p in wanted if p.requires_grad]  # a load-balancing bias is not trained by gradients
    loss = {"tune": _tune_loss, "router": partial(_router_loss, teacher)}.get(method) or _ExpertsLoss(model, teacher, plan)
    options = {"max_steps": steps, "learning_rate": learning_rate, "lr_scheduler_type": schedule, "seed": seed}
    with ExitStack() as stack:
        stack.enter_context(_training(model, wanted))
        if teacher is not None:
            stack.enter_context(evaluating(teacher))
        if model.dtype in (torch.float32, torch.bfloat16):  # dtypes that the grouped product supports
            stack.enter_context(experts_implementation(layers, "grouped_mm"))
        options |= {"output_dir": stack.enter_context(tempfile.TemporaryDirectory())}
        trainer = _trainer(model, tokens, options | {"per_device_train_batch_size": batch_size, **arguments}, loss)
        seconds = seconds_of(trainer.train)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    about = {"method": method, "steps": steps, "seconds": seconds, "trained": sum(p.numel() for p in wanted)}
    return about | {"losses": losses, "balance": getattr(loss, "balance", None)}


def under_fsdp() -> bool:
    """Whether `accelerate launch` asked for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def gathered(model) -> dict[str, torch.Tensor] | None:
    """All weights of a model that FSDP has sharded, on the CPU of the first process (empty on others), for loading into a
    whole model. None if nothing is sharded. Every process must call it."""
    if not any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: tensor for name, tensor in state.items() if name not in model.all_tied_weights_keys}


def _check_teacher(model, teacher, plan: PruningPlan | None, method: str) -> None:
    """Raises ValueError unless the teacher's layers match the model's, directly or through a plan made for the teacher."""
    if teacher is None:
        raise ValueError(f"The method {method!r} learns from the full model: give it as teacher=.")
    one, other = moe_layers(model), moe_layers(teacher)
    if method == "experts":
        check_held([layer.experts for layer in other], "load the teacher whole, or take the method 'router'")
    if len(one) != len(other):
        raise ValueError(f"The layers do not match: the teacher has {len(other)} MoE layers, the student {len(one)}.")
    if plan and len(plan.kept) != len(one):
        raise ValueError(f"The pruning plan is for {len(plan.kept)} MoE layers, the models have {len(one)}.")
    if model.config.get_text_config().vocab_size != teacher.config.get_text_config().vocab_size:
        raise ValueError("The teacher has another vocabulary than the student: they cannot be fed the same tokens.")
    kept_of = plan.kept if plan else [range(layer.n) for layer in other]
    for mine, theirs, kept in zip(one, other, kept_of, strict=True):
        if len(kept) != mine.n or kept[-1] >= theirs.n:
            ending = f", and the plan keeps {len(kept)}." if plan else ": give the pruning plan that says which are left."
            raise ValueError(f"The layers do not match: {mine.name} has {mine.n} experts, the teacher {theirs.n}{ending}")
        if mine.experts.down_proj.shape[1:] != theirs.experts.down_proj.shape[1:]:
            raise ValueError(f"The layers do not match: the experts of {mine.name} are of another shape than the teacher's.")
    if plan:
        check_fingerprint(teacher, plan.model, "pruning plan")


@contextmanager
def _training(model, wanted: Sequence[nn.Parameter]) -> Iterator[None]:
    """Put the model in training mode with only these parameters trainable, half-precision ones held as float32; restore modes
    and dtypes on leaving."""
    former = [(p, p.requires_grad) for p in model.parameters()]
    half = [(p, p.dtype) for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16) and not under_fsdp()]
    model.requires_grad_(False)
    for parameter in wanted:
        parameter.requires_grad_(True)
    for parameter, _ in half:  # FSDP does it shard by shard
        parameter.data = parameter.data.float()
    try:
        with temporarily(model.modules(), "training", True):
            yield
    finally:
        model.zero_grad()
        for parameter, dtype in half:
            parameter.data = parameter.data.to(dtype)
        for parameter, trainable in former:
            parameter.requires_grad_(trainable)


def _trainer(model, tokens: torch.Tensor, options: dict, loss: Callable):
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Watch(TrainerCallback):
        """Keeps zero weights zero, and shows a progress bar."""

        def on_train_begin(self, args, state, control, model=None, **_):
            self.present = zeros(model)
            self.bar = tqdm(total=args.max_steps, desc="recover", unit="step", disable=not state.is_world_process_zero)

        def on_optimizer_step(self, args, state, control, model=None, **_):
            restore_zeros(model, self.present)
            self.bar.update()

        def on_train_end(self, *_, **__):
            self.bar.close()

    quiet = {"save_strategy": "no", "report_to": "none", "logging_steps": 1, "disable_tqdm": True, "log_level": "error"}
    quiet |= {"dataloader_pin_memory": torch.cuda.is_available(), "ddp_find_unused_parameters": False}
    rows = [{"input_ids": row} for row in tokens]
    trainer = Trainer(model, TrainingArguments(**quiet | options), train_dataset=rows, callbacks=[Watch()])
    trainer.remove_callback(PrinterCallback)
    trainer.compute_loss = lambda model, inputs, **_: loss(model, inputs)
    trainer.model_accepts_loss_kwargs = False  # a mean over each batch, however many are accumulated
    return trainer


def _tune_loss(model, inputs) -> torch.Tensor:
    """L_CE, the mean next-token cross-entropy. A model's own loss would include its config's additions."""
    logits, ids = model(**inputs, use_cache=False).logits, inputs["input_ids"]
    return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def _router_loss(teacher, model, inputs) -> torch.Tensor:
    """KL(teacher || student), the mean over tokens."""
    ids = inputs["input_ids"]
    expected = _teacher_logits(teacher, ids).float().log_softmax(-1).to(ids.device)
    return kl(expected, model(input_ids=ids, use_cache=False).logits) / ids.numel()


class _ExpertsLoss:
    """L_CE + balance * S, see `recover`."""

    def __init__(self, model, teacher, plan: PruningPlan | None):
        self.teacher, self.balance = teacher, None
        self.layers, self.theirs = moe_layers(model), moe_layers(teacher)
        self.kept = plan.kept if plan else [range(layer.n) for layer in self.theirs]

    def __call__(self, model, inputs) -> torch.Tensor:
        with capture_expert_inputs(self.theirs) as before:
            _teacher_logits(self.teacher, inputs["input_ids"])
        with capture_expert_inputs(self.layers) as now:
            loss = _tune_loss(model, inputs)
        pairs = zip(self.layers, self.theirs, now, before, self.kept, strict=True)
        apart = torch.stack([expert_differences(*pair).sum() for pair in pairs]).sum()
        if self.balance is None:
            if apart <= ROUNDING * sum(states.float().square().mean() for states, _ in before):
                raise ValueError("The student's experts give just what the teacher's give: there is nothing to distil.")
            means = [summed(one.detach().clone()) / ranks() for one in (loss, apart)]  # over all processes
            self.balance = (means[0] / means[1]).item()
        return loss + self.balance * apart


@torch.no_grad()
def _teacher_logits(teacher, ids: torch.Tensor) -> torch.Tensor:
    """The teacher's logits. The teacher moves to the tokens' device unless it is spread over several."""
    if teacher.device != ids.device and not hasattr(teacher, "hf_device_map"):
        teacher.to(ids.device)
    return _forward(teacher, ids).logits


@contextmanager
def capture_expert_inputs(layers: Sequence[MoELayer]) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Hidden states [tokens, d] and chosen experts [tokens, k] of each layer's experts in a forward pass."""
    seen: list = [None] * len(layers)

    def hook(number: int, _module, inputs, named) -> None:
        given = dict(zip(("hidden_states", "top_k_index"), inputs, strict=False)) | named
        seen[number] = (given["hidden_states"], given["top_k_index"])

    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            stack.enter_context(layer.experts.register_forward_pre_hook(partial(hook, number), with_kwargs=True))
        yield seen


def expert_differences(student: MoELayer, teacher: MoELayer, now, before, kept: Sequence[int]) -> torch.Tensor:
    """MSE between the teacher's and the student's expert, for each kept expert, float32 [r], over the tokens that the teacher
    routes to it.

    now, before: the student's and the teacher's inputs from `capture_expert_inputs` on the same tokens.
    """
    (mine, _), (theirs, chosen) = now, before
    place = torch.full((teacher.n,), student.n, device=chosen.device)
    place[torch.tensor(kept, device=chosen.device)] = torch.arange(student.n, device=chosen.device)
    counterpart = place[chosen]  # [tokens, k], student.n for experts the student lacks
    with torch.no_grad():
        wanted = pair_outputs(teacher.experts, theirs, chosen.masked_fill(counterpart == student.n, teacher.n))
    given = pair_outputs(student.experts, mine, counterpart.to(mine.device))
    apart = (given.float() - wanted.to(given.device).float()).square().mean(-1).flatten()  # [tokens * k]
    sums = apart.new_zeros(student.n + 1).index_add(0, counterpart.flatten(), apart)
    counts = torch.bincount(counterpart.flatten(), minlength=student.n + 1)
    return (sums / counts.clamp(min=1))[: student.n]


# --- from folder to folder ------------------------------------------------------------------------------------------


def recover_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    teacher: str | None,
    plan: str | Path | None,
    corpus: str,
    sequences: int,
    length: int,
    seed: int,
    dtype: torch.dtype | str | None,
    **options,
) -> dict:
    """`recover` a pruned folder and save the result in another; returns the report of `recover`.

    teacher: a model's name; plan: its file; corpus: as for `calibration_tokens`; options: others of `recover`. Under
    torchrun or accelerate every process calls this, and rank 0 saves. Raises FileExistsError if the destination exists.
    """
    refuse_existing(destination)
    if under_fsdp():  # must precede loading, so that only rank 0 reads the weights
        from accelerate import PartialState

        PartialState()
    model, tokenizer = load_model(source, dtype=dtype)
    full = load_model(teacher, dtype=dtype)[0] if teacher else None
    tokens = calibration_tokens(corpus, tokenizer, sequences=sequences, length=length, seed=seed)
    report = recover(model, tokens, teacher=full, plan=plan and PruningPlan.load(plan), seed=seed, **options)
    state = gathered(model)
    if is_first():
        if state is not None:
            model = load_model(source, dtype=dtype)[0]
            lacking, unknown = model.load_state_dict(state, strict=False)
            if unknown or set(lacking) - set(model.all_tied_weights_keys):
                raise RuntimeError(f"Training renamed parameters, such as {[*unknown, *lacking][0]}: nothing was saved.")
        save_model(model, tokenizer, destination)
    return report
