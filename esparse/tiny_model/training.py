"""A tokenizer, and tiny Mixtrals trained on the two synthetic corpora.

Presets are named configurations. The model of "tiny" ships trained. The others start with random weights, for tests and
other shapes, and can be trained in the same way.
"""

import hashlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..corpora import SYNTHETIC, documents
from ..documents import plain
from ..files import digest
from . import synthetic

VOCABULARY = 1024
SEQUENCE = 256  # tokens
LEARNING_RATE = 3e-3
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
_SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 6, "max_position_embeddings": 1024}
_SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
_SHAPE |= {"rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"}}
_SHAPE |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_LARGER = {"hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6}  # 51 M parameters
PRESETS = {
    "tiny": _SHAPE | {"intermediate_size": 256, "num_local_experts": 8, "num_experts_per_tok": 2},
    "tiny-16": _SHAPE | {"intermediate_size": 128, "num_local_experts": 16, "num_experts_per_tok": 2},
    "tiny-32": _SHAPE | {"intermediate_size": 64, "num_local_experts": 32, "num_experts_per_tok": 8},
    "small-16": _SHAPE | _LARGER | {"intermediate_size": 320, "num_local_experts": 16, "num_experts_per_tok": 2},
}
STEP_SEQUENCES = {"web": 5, "arithmetic": 3}  # sequences of each corpus in a step


@dataclass(frozen=True)
class Recipe:
    """The settings of a training, without the seed: a preset, the number of steps, and the sequences in a step, of which five
    of eight are web and three arithmetic. text: two files, general and domain, for half of each step, also five to three.

    Raises ValueError for an unknown preset, invalid steps or sequences, and missing, equal or misnamed files.
    """

    preset: str = "tiny"
    steps: int = 3600
    sequences: int = 8
    text: tuple[str, ...] = ()

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise ValueError(f"There is no preset {self.preset!r}: choose from {', '.join(PRESETS)}.")
        if self.steps < 1:
            raise ValueError(f"Training takes at least one step, got {self.steps}.")
        if self.sequences < self.parts or self.sequences % self.parts:
            raise ValueError(f"A step takes a multiple of {self.parts} sequences, got {self.sequences}.")
        for path in self.text:
            if "+" in path or not Path(path).is_file():
                raise ValueError(f"{path} is no file, or has a plus sign in its path, which stands between corpora: move it.")
        if self.text and len(set(self.text)) != 2:
            raise ValueError("Text is two files, of which the first is the study's general corpus and the second its domain.")

    @property
    def parts(self) -> int:
        """`sequences` must be a multiple of this."""
        return sum(STEP_SEQUENCES.values()) * (2 if self.text else 1)

    @property
    def rows(self) -> dict[str, int]:
        """Sequences of each corpus in a step."""
        shares = STEP_SEQUENCES | dict(zip(self.text, STEP_SEQUENCES.values(), strict=False))
        return {corpus: share * (self.sequences // self.parts) for corpus, share in shares.items()}

    def __str__(self) -> str:
        if self == TINY:
            return "the tiny model's"
        corpora = ", ".join(Path(corpus).name for corpus in self.rows)
        return f"{self.preset}, trained for {self.steps} steps of {self.sequences} sequences of {corpora}"

    @property
    def key(self) -> str:
        """The name of the folder for this recipe's models."""
        held = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in self.text]
        return self.preset if self == TINY else f"{self.preset}-{digest(asdict(self) | {'text': held})}"


TINY = Recipe()  # the recipe of the model that ships


def preset_model(name: str = "tiny", seed: int = 0, **changes):
    """A float32 `MixtralForCausalLM` of a preset with random weights; `changes` override configuration entries."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(**PRESETS[name] | changes)).eval()


def train_tokenizer(documents: int = 4000):
    """A byte-level BPE of 1024 tokens in which every digit, with or without a space before it, is one token."""
    from tokenizers import Regex, Tokenizer, decoders, models, processors, trainers
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = Sequence([Split(Regex(" ?[0-9]"), "isolated"), ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    texts = [d for corpus in SYNTHETIC for d in itertools.islice(synthetic.documents(corpus, seed=0), documents)]
    texts += [f" {digit} {digit}{digit}" for digit in "0123456789" for _ in range(10)]
    options = {"special_tokens": [*SPECIAL.values()], "initial_alphabet": ByteLevel.alphabet(), "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY, **options))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **SPECIAL)


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


def balance_loss(logits: torch.Tensor, k: int) -> torch.Tensor:
    """The balance loss of Switch Transformers for one layer's router logits [tokens, experts]: 1 if balanced with k = 1."""
    probabilities = logits.float().softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter_(1, logits.topk(k).indices, 1.0)
    return logits.shape[1] * (chosen.mean(0) * probabilities.mean(0)).sum() / k


def train_model(tokenizer, recipe: Recipe = TINY, *, seed: int = 0, device: str = "cpu"):
    """A Mixtral trained by a recipe with AdamW on the device, where it stays.

    The balance loss has weight 0.01 for the first third, so that all experts are used, then 0.001, so that they specialise.
    On a CPU, equal seeds and thread counts give equal weights.
    """
    model = preset_model(recipe.preset, seed, output_router_logits=False).train().to(device)
    steps, k = recipe.steps, model.config.num_experts_per_tok
    # On a GPU the grouped product is fast only in bf16.
    model.set_experts_implementation("grouped_mm" if device == "cpu" else "eager")
    parameters = list(model.parameters())
    matrices = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05}
    vectors = {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, vectors], lr=LEARNING_RATE, betas=(0.9, 0.95))
    # 100 steps of linear warm-up, then linear decay to 0.
    rate = lambda step: min((step + 1) / 100, max(0.0, (steps - step) / max(1, steps - 100)))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    streams = [(packed_sequences(corpus, tokenizer, seed), n) for corpus, n in recipe.rows.items()]
    for step in tqdm(range(steps), desc="training", unit="step"):
        batch = torch.stack([row for stream, n in streams for row in itertools.islice(stream, n)]).to(device)  # [rows, 256]
        output = model(batch, labels=batch, output_router_logits=True)
        language_loss = output.loss - model.router_aux_loss_coef * output.aux_loss
        # Over all layers pooled, the loss could be small although each layer uses only a few experts.
        balance = torch.stack([balance_loss(logits, k) for logits in output.router_logits]).mean()
        (language_loss + (0.01 if step < steps // 3 else 0.001) * balance).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()
