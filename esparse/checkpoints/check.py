"""What the files of a folder tell before it is published: whether it loads whole, and what engines will trip over.

What is said of engines stands in their sources: in vLLM's cpu_attn.py and registry.py (at 0002bff), llama.cpp's llama-quant.cpp
(at 007dbbf) and conversion/__init__.py (at 00bdaa1), and mlx-lm 0.32.2's models. Newer versions may read more.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from jinja2 import TemplateError
from torch import nn

from ..files import read_json
from ..moe.layers import COUNT_NAMES, is_known, moe_layers
from ..moe.published import published
from .folder import CONFIG, PLAN, REPORT, SKIPPING_FILE, json_object
from .layout import PREDICTING, Checkpoint, Layout, expert_counts
from .models import layer_number, load_tokenizer, read_betas
from .reader import DECODED, CheckpointReader, fetch, quantisation, read_config

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of vLLM's attention on a CPU
PARALLEL = (1, 2, 4, 8)
BLOCK, SMALL_BLOCK = 256, 32  # weights in a block of llama.cpp's K-quants, and of the types that they fall back to
EIGHT = "llama-quantize --tensor-type attn_v=q8_0 --tensor-type attn_k=q8_0 --tensor-type attn_output=q5_k IN OUT Q4_K_M"

# The families that mlx-lm reads, by the name under which it takes the number of experts, which is the published one.
MLX = {
    "num_local_experts": "mixtral gpt_oss granitemoe granitemoehybrid phimoe minimax minimax_m2 minimax_m3_vl",
    "num_experts": """qwen2_moe qwen3_moe qwen3_next olmoe jamba kimi_linear bailing_hybrid lfm2_moe afmoe exaone_moe
        laguna mellum gemma4 gemma4_text qwen3_5_moe qwen3_vl_moe""",
    "n_routed_experts": """deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe glm4_moe_lite glm_moe_dsa nemotron_h dots1
        mimo_v2_flash solar_open kimi_k25""",
    "moe_num_experts": "ernie4_5_moe",
}
# Those of them whose theta it takes from rope_parameters.
MLX_NESTED = "glm_moe_dsa granitemoehybrid lfm2_moe gemma4 gemma4_text exaone_moe laguna mellum qwen3_5_moe minimax_m3_vl"
# The architectures, without ForCausalLM or ForConditionalGeneration, that both other engines read, and those of one alone.
_BOTH = """
    Afmoe DeepseekV2 DeepseekV3 DeepseekV32 Dots1 Ernie4_5_Moe Glm4Moe GptOss GraniteMoe GraniteMoeHybrid GraniteMoeShared
    HunYuanMoEV1 Jamba KimiLinear Lfm2Moe MiMoV2Flash MiniMaxM2 Mixtral NemotronH Olmoe PhiMoE Qwen2Moe Qwen3Moe Qwen3Next
    Glm4vMoe Qwen3VLMoe
"""
ARCHITECTURES = {
    "vLLM": f"{_BOTH} Aria FlexOlmo MiniMax",
    "llama.cpp": f"{_BOTH} Cohere2Moe ExaoneMoE Gemma4 Glm4MoeLite GlmMoeDsa KimiK25 Mellum Qwen3_5Moe SolarOpen",
}
# Entries of config.json that may differ from the full model's.
CHANGED = {*COUNT_NAMES, *PREDICTING, "transformers_version", "transformers_weights", "quantization_config", "_name_or_path"}
CHANGED |= {"output_router_logits", "dtype", "torch_dtype"}
TALK = (("user", "Hello."), ("assistant", "Hello!"), ("user", "Go on."))


class Finding(NamedTuple):
    """One line of a check. status: "ok", "warn" (some engine or user will trip over it) or "fail" (the folder is broken)."""

    name: str
    status: str
    value: object
    note: str


def _judged(name: str, value: object, wrong: str | None, right: str, status: str = "warn") -> Finding:
    """A finding with this status and note where something is wrong, else an "ok"."""
    return Finding(name, status if wrong else "ok", value, wrong or right)


@dataclass
class Inspected:
    """A folder to be checked. full: the folder of the model that it was pruned from, if known."""

    folder: Path
    full: Path | None

    def __post_init__(self):
        self.config = read_config(self.folder)
        self.text, self.entries = self.config.get_text_config(), text_entries(self.folder, self.config)
        self.n, self.k = expert_counts(self.config)
        self.layout = Layout(self.config, self.n)
        self.layer = moe_layers(self.layout.text)[0]

    @cached_property
    def before(self) -> int | None:
        """The number of experts a layer before pruning: the full model's, or as the pruning report says."""
        if self.full:
            return expert_counts(read_config(self.full))[0]
        return json_object(self.folder, REPORT, "report").get("n") if (self.folder / REPORT).is_file() else None

    @property
    def inner(self) -> int:
        """The width of an expert."""
        return self.layer.experts.down_proj.shape[1 if self.layer.experts.is_transposed else 2]

    @property
    def mlx_count(self) -> str | None:
        """The name under which mlx-lm takes the number of experts; None for a family that it does not read."""
        return next((name for name, families in MLX.items() if self.config.model_type in families.split()), None)

    def of_attention(self, name: str) -> int | None:
        """A number of the config; None where it has none, or layers have their own."""
        try:
            return getattr(self.text, name, None) if is_known(self.text, name) else None
        except RuntimeError:
            return None


def text_entries(folder: Path, config) -> dict:
    """The entries of config.json that describe the language model; config: the same file, as transformers reads it."""
    entries, text = json_object(folder, CONFIG, "model config"), config.get_text_config()
    parts = (value for name, value in entries.items() if isinstance(value, dict) and getattr(config, name, None) is text)
    return next(parts, entries)


def inspect_folder(source: str | Path, against: str | Path | None = None) -> list[Finding]:
    """What the files of a folder or hub id tell; the weights are read once, to find NaN and infinities. `against`: the full
    model's folder or hub id. What keeps the folder from being read is a finding too, the last."""
    try:
        inspected = Inspected(fetch(str(source)), against and fetch(str(against)))
    except ValueError as error:
        return [Finding("config", "fail", "", str(error))]
    return [finding for check in CHECKS for finding in check(inspected)]


def _weights(found: Inspected) -> Iterator[Finding]:
    try:
        checkpoint = Checkpoint(CheckpointReader(found.folder), found.layout)
    except (ValueError, OSError) as error:
        held = quantisation(found.config).get("quant_method") not in DECODED
        yield Finding("tensors", "warn" if held else "fail", "", f"Not checked: {error}" if held else str(error))
        return
    ignored = checkpoint.left_out
    more = f"{len(ignored)} tensors, such as {ignored[0]}, are part of no model that transformers makes." if ignored else None
    yield _judged("tensors", len(checkpoint.used), more, "Every tensor that config.json asks for is there, in its shape.")
    try:
        checkpoint.check_finite()
        yield Finding("finite", "ok", "", "No weight is NaN or infinite.")
    except ValueError as error:
        yield Finding("finite", "fail", "", str(error))


def _counts(found: Inspected) -> Iterator[Finding]:
    counts = {name: found.entries[name] for name in COUNT_NAMES if isinstance(found.entries.get(name), int)}
    for name, key in ((PLAN, "r"), (REPORT, "r")):
        if (found.folder / name).is_file():
            counts[name] = json_object(found.folder, name, "file").get(key)
    groups = getattr(found.text, "n_group", None) or 1
    wrong = f"They differ: {', '.join(f'{name} {count}' for name, count in counts.items())}."
    wrong = wrong if set(counts.values()) - {found.n} else None
    if found.k > found.n or found.n % groups:
        wrong = f"{found.k} experts a token of {found.n} in {groups} groups cannot be chosen."
    agree = f"config.json, tensors and routers agree: {found.n} experts, {found.k} a token."
    yield _judged("expert count", found.n, wrong, agree, status="fail")


def _tokenizer(found: Inspected) -> Iterator[Finding]:
    try:
        tokenizer = load_tokenizer(str(found.folder))
    except ValueError as error:
        yield Finding("tokenizer", "fail", "", str(error))
        return
    last, rows = max(tokenizer.get_vocab().values()), found.text.vocab_size
    wrong = f"Its last id is {last}, but the embeddings have {rows} rows." if last >= rows else None
    if found.full and tokenizer.get_vocab() != load_tokenizer(str(found.full)).get_vocab():
        wrong = "Its vocabulary is not that of the full model."
    yield _judged("tokenizer", last + 1, wrong, "It loads, and each id has an embedding.", status="fail")


def _template(found: Inspected) -> Iterator[Finding]:
    try:
        tokenizer = load_tokenizer(str(found.folder))
    except ValueError:
        return  # `_tokenizer` says so
    if not tokenizer.chat_template:
        return
    talk, wrong = [{"role": role, "content": content} for role, content in TALK], None
    try:
        if TALK[-1][1] not in tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True):
            wrong = "It drops what the user says."
    except (TemplateError, TypeError, ValueError) as error:
        wrong = f"It refuses a talk of three turns: {error}."
    if wrong is None and found.full and load_tokenizer(str(found.full)).chat_template != tokenizer.chat_template:
        wrong = "It is not the full model's."
    yield _judged("chat template", "", wrong, "It takes a talk of three turns.", status="fail")


def _engines(found: Inspected) -> Iterator[Finding]:
    named = (found.config.architectures or [""])[0]
    for engine, known in ARCHITECTURES.items():
        read = named.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration") in known.split()
        wrong = None if read else f"{named or 'No architecture'} is none that {engine} is known here to read."
        yield _judged(engine, named, wrong, f"{engine} has this architecture.")
    family, count = found.config.model_type, found.mlx_count
    lacking = None if count in found.entries else f"mlx-lm takes the number of experts as {count}, which config.json lacks."
    yield _judged("mlx-lm", family, lacking if count else "mlx-lm 0.32.2 does not read this family.", "mlx-lm has this family.")


def _entries(found: Inspected) -> Iterator[Finding]:
    """Entries of config.json that engines read and transformers 5 does not write."""
    parameters = found.entries.get("rope_parameters")
    nested = isinstance(parameters, dict) and "rope_theta" in parameters
    if nested and found.mlx_count and found.config.model_type not in MLX_NESTED.split():
        wrong = "config.json has it in rope_parameters alone: mlx-lm 0.32.2 then computes with its own, such as 1,000,000."
        wrong = None if "rope_theta" in found.entries else wrong
        yield _judged("rope_theta", f"{parameters['rope_theta']:.0f}", wrong, "It stands beside rope_parameters.")
    if found.text.model_type.startswith(("deepseek_v2", "deepseek_v3")):
        lost = [name for name in ("scoring_func", "topk_method") if name not in found.entries]
        wrong = f"config.json lacks {' and '.join(lost)}: vLLM needs topk_method, llama.cpp takes softmax without scoring_func."
        yield _judged("DeepSeek routing", "", wrong if lost else None, "scoring_func and topk_method are there.")


def _overlooked(found: Inspected) -> Iterator[Finding]:
    """What engines overlook, as `.ci/engines` showed, whether the model is pruned or not."""
    if found.text.model_type == "ernie4_5_moe":
        who = "mlx-lm 0.32.2 and the CPU build of vLLM 0.32.0"
        yield Finding("router bias", "warn", "", f"{who} leave out the bias of ERNIE's routers, and so choose other experts.")
    scaling = getattr(found.text, "rope_parameters", None) or {}
    if found.text.model_type == "gpt_oss" and scaling.get("rope_type") == "yarn":
        wrong = "mlx-lm 0.32.2 and llama.cpp round YaRN's bounds, which truncate: false forbids: their logits differ."
        yield _judged("YaRN", "", None if scaling.get("truncate", True) else wrong, "Its bounds may be rounded.")


def _skipping(found: Inspected) -> Iterator[Finding]:
    path = found.folder / SKIPPING_FILE
    if not path.is_file():
        return
    numbers = [layer_number(layer.name) for layer in moe_layers(found.layout.text)]
    try:
        count = len(read_betas(path))
    except ValueError as error:
        yield Finding("skipping", "fail", "", str(error))
        return
    held, wrong, status = read_json(path, "file of betas"), None, "warn"
    if count != len(numbers):
        wrong, status = f"{SKIPPING_FILE} needs one beta for each of the {len(numbers)} MoE layers.", "fail"
    elif isinstance(held, list) or held.get("layers") != numbers:
        wrong = f"{SKIPPING_FILE} does not name the layers of its betas, as the plug-in for vLLM needs."
    yield _judged("skipping", count, wrong, "esparse and its plug-in for vLLM skip with these betas.", status)


def _head(found: Inspected) -> Iterator[Finding]:
    heads = found.of_attention("num_attention_heads")
    if heads and not found.of_attention("kv_lora_rank"):  # with it, attention is of another kind
        size = found.of_attention("head_dim") or found.text.hidden_size // heads
        wrong = None if size in HEAD_SIZES else f"vLLM's CPU attention takes {', '.join(map(str, HEAD_SIZES))} alone."
        yield _judged("head size", size, wrong, "vLLM's CPU attention takes it.")


def _parallel(found: Inspected) -> Iterator[Finding]:
    heads, pairs = found.of_attention("num_attention_heads") or 1, found.of_attention("num_key_value_heads") or 1
    shared = [s for s in PARALLEL if heads % s == 0 == found.inner % s and (pairs % s == 0 or s % pairs == 0)]
    tensor, expert = (lambda n: [s for s in shared if s <= n]), (lambda n: [s for s in PARALLEL if n % s == 0])
    notes = {
        "tensor parallel": (tensor, "Many of vLLM's models refuse more GPUs than experts", "share heads and inner size evenly"),
        "expert parallel": (expert, "vLLM's EPLB wants equally many experts on each GPU", "hold equally many experts"),
    }
    for name, (sizes, why, what) in notes.items():
        lost = [str(size) for size in sizes(found.before or found.n) if size not in sizes(found.n)]
        wrong = f"{why}: {found.before} experts could go on {' or '.join(lost)}, these {found.n} cannot." if lost else None
        yield _judged(name, sizes(found.n), wrong, f"So many GPUs {what}.")


def row_lengths(model: nn.Module) -> dict[int, str]:
    """The row lengths of the matrices that llama.cpp quantises, each with the name of one."""
    lengths, layers = {}, moe_layers(model)
    gates = {module for layer in layers for module in layer.gate.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and module not in gates:
            lengths.setdefault(getattr(module, "in_features", None) or module.embedding_dim, name)
    for layer in layers:
        down = layer.experts.down_proj.shape
        lengths.setdefault(down[1 if layer.experts.is_transposed else 2], f"{layer.name}.experts.down_proj")
    return lengths


def _quants(found: Inspected) -> Iterator[Finding]:
    odd = {length: name for length, name in row_lengths(found.layout.text).items() if length % BLOCK}
    rows = ", ".join(f"{length} ({name})" for length, name in sorted(odd.items()))
    wrong = "llama.cpp's K-quants need rows of a multiple of 256; here it takes Q5_0 for Q4_K, Q5_1 for Q5_K and Q8_0 for Q6_K"
    wrong += "." if not any(length % SMALL_BLOCK for length in odd) else ", and F16 where rows are no multiple of 32."
    yield _judged("K-quants", rows, wrong if odd else None, "All rows are multiples of 256, as llama.cpp's K-quants need.")
    fell = found.n != 8 and (found.before == 8 or (found.before is None and found.n < 8))
    recipe = f"With exactly 8 experts llama.cpp quantises attention finer; keep that with: {EIGHT}"
    yield _judged("8 experts", found.n, recipe if fell else None, "llama.cpp's recipe is that of the full model.")


def _beside(found: Inspected) -> Iterator[Finding]:
    if not found.full:
        return
    told = (text_entries(found.full, read_config(found.full)), found.entries)
    full, own = (published(entries, found.text.model_type) for entries in told)  # as esparse writes them
    names = [name for name in {**full, **own} if name not in CHANGED]
    other = [name for name in names if full.get(name, found) != own.get(name, found)]
    wrong = f"Not as in the full model's config.json: {', '.join(other)}." if other else None
    yield _judged("config", len(names), wrong, "Apart from counts it is the full model's.")


CHECKS = (
    _weights,
    _counts,
    _tokenizer,
    _template,
    _engines,
    _entries,
    _overlooked,
    _skipping,
    _head,
    _parallel,
    _quants,
    _beside,
)
