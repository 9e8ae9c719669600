"""A tokenizer, and tiny Mixtrals trained on the two synthetic corpora.

Presets are named configurations. The model of "tiny" ships trained. The others start with random weights, for tests and
other shapes, and can be trained in the same way.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping

import torch
from tqdm.auto import tqdm

from ..corpora import SYNTHETIC, documents
from ..documents import plain
from . import synthetic

VOCABULARY = 1024
SEQUENCE = 256  # tokens
LEARNING_RATE = 3e-3
_SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=128,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    rope_parameters={"rope_theta": 10_000.0, "rope_type": "default"},
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
PRESETS = {
    "tiny": dict(_SHAPE, intermediate_size=256, num_local_experts=8, num_experts_per_tok=2),
    "tiny-16": dict(_SHAPE, intermediate_size=128, num_local_experts=16, num_experts_per_tok=2),
    "tiny-32": dict(_SHAPE, intermediate_size=64, num_local_experts=32, num_experts_per_tok=8),
}
PRESETS["small-16"] = dict(  # larger: 51 M parameters
    PRESETS["tiny-16"], hidden_size=384, num_hidden_layers=8, num_attention_heads=6, intermediate_size=320
)
STEP_SEQUENCES = {"web": 5, "arithmetic": 3}  # sequences of each corpus in a step
STEPS = 3600


def preset_model(name: str = "tiny", seed: int = 0, **changes):
    """A float32 `MixtralForCausalLM` of a preset with random weights; `changes` override configuration entries."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(**{**PRESETS[name], **changes})).eval()


def train_tokenizer(documents: int = 4000):
    """A byte-level BPE of 1024 tokens in which every digit, with or without a space before it, is one token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(" ?[0-9]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    texts = [d for c in ("web", "arithmetic") for d in itertools.islice(synthetic.documents(c, seed=0), documents)]
    texts += [f" {digit} {digit}{digit}" for digit in "0123456789" for _ in range(10)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


def packed_sequences(corpus: str, tokenizer, seed: int) -> Iterator[torch.Tensor]:
    """Endless int64 rows [SEQUENCE] of one corpus. Documents end in </s> and continue across rows."""
    buffer = [tokenizer.bos_token_id]
    for text in synthetic.documents(corpus, seed) if corpus in SYNTHETIC else _repeated(corpus, seed):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        buffer += [*ids, tokenizer.eos_token_id, tokenizer.bos_token_id]
        while len(buffer) >= SEQUENCE:
            yield torch.tensor(buffer[:SEQUENCE])
            buffer = buffer[SEQUENCE:]


def _repeated(path: str, seed: int) -> Iterator[str]:
    """A file's documents without the held-out fifth, endlessly, in a new order each time; see `corpora.documents`."""
    texts, shuffle = [plain(document) for document in documents(f"{path}/rest")], random.Random(seed).shuffle
    if not texts:
        raise ValueError(f"{path} has no document but those held out: give a file of more documents.")
    while True:
        shuffle(texts)
        yield from texts


def balance_loss(router_logits: tuple[torch.Tensor, ...], k: int) -> torch.Tensor:
    """The balance loss of Switch Transformers per layer, averaged over layers (1 if balanced with k = 1).

    A single loss over all layers pooled could be small although each layer uses only a few experts.
    """
    losses = []
    for logits in router_logits:  # [tokens, experts]
        probabilities = logits.float().softmax(-1)
        chosen = torch.zeros_like(probabilities).scatter_(1, logits.topk(k).indices, 1.0)
        losses.append(logits.shape[1] * (chosen.mean(0) * probabilities.mean(0)).sum() / k)
    return torch.stack(losses).mean()


def _schedule(step: int, steps: int) -> float:
    """100 steps of linear warm-up, then linear decay to 0."""
    return min((step + 1) / 100, max(0.0, (steps - step) / max(1, steps - 100)))


def train_model(
    tokenizer,
    preset: str = "tiny",
    *,
    steps: int = STEPS,
    seed: int = 0,
    rows: Mapping[str, int] = STEP_SEQUENCES,
    device: str = "cpu",
    report: Callable[[int, float], None] | None = None,
):
    """A Mixtral of a preset, trained with AdamW on the device, where it stays. rows: for each corpus ("web", "arithmetic" or
    a file), sequences of 256 tokens per step. `report(step, loss)` is called every 100 steps.

    The balance loss has weight 0.01 for the first third, so that all experts are used, then 0.001, so that they specialise.
    On a CPU, equal seeds and thread counts give equal weights.
    """
    model = preset_model(preset, seed, output_router_logits=False).train().to(device)
    # On a GPU the grouped product is fast only in bf16.
    model.set_experts_implementation("grouped_mm" if device == "cpu" else "eager")
    parameters = list(model.parameters())
    matrices = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05}
    vectors = {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, vectors], lr=LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, steps))
    streams = [(packed_sequences(corpus, tokenizer, seed), n) for corpus, n in rows.items()]
    k = model.config.num_experts_per_tok
    for step in tqdm(range(steps), desc="training", unit="step"):
        batch = torch.stack([row for stream, n in streams for row in itertools.islice(stream, n)]).to(device)  # [rows, 256]
        output = model(batch, labels=batch, output_router_logits=True)
        language_loss = output.loss - model.router_aux_loss_coef * output.aux_loss
        (language_loss + (0.01 if step < steps // 3 else 0.001) * balance_loss(output.router_logits, k)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if report and step % 100 == 99:
            report(step + 1, language_loss.item())
    return model.eval()
