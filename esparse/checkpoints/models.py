"""Loading models and tokenizers, and saving pruned models so that stock transformers loads them."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from ..files import SHIPPED, data_folder, local_folder, new_folder, read_json, write_json, write_text
from ..moe.identity import remember_stored
from ..moe.layers import moe_blocks, moe_layers
from ..pruning.plan import PruningPlan
from ..pruning.skipping import disable_skipping, enable_skipping, skipping_betas
from ..tiny_model.training import PRESETS, preset_model
from .folder import CONFIG, PLAN, SKIPPING_FILE, tensors
from .layout import count_experts, opened, stock_class, written_config
from .reader import CheckpointReader, described, fetch, model_from_hub, read_config

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
_ALIASES = {"bf16": torch.bfloat16, "half": torch.float16, "float": torch.float32, "double": torch.float64}
_ALIASES |= {"fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64, "none": None, "auto": None}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tekken.json")


def read_dtype(name: torch.dtype | str | None, *, eight_bits: bool = False) -> torch.dtype | str | None:
    """The dtype of a name such as "bf16"; None (the checkpoint's own) for None and "auto".

    eight_bits: whether to allow "int8", which is returned as it is. Raises ValueError for any other name.
    """
    word = str(name).removeprefix("torch.").lower()
    dtypes = _DTYPES | _ALIASES | ({"int8": "int8"} if eight_bits else {})
    if word not in dtypes:
        raise ValueError(f"Unknown dtype {name!r}: take one of {', '.join(_DTYPES)}, auto{', int8' * eight_bits}.")
    return dtypes[word]


def read_device(name: torch.device | str | None) -> torch.device | None:
    """The device of a name. Raises ValueError for a name that torch does not know, and for a GPU that does not exist."""
    try:
        device = None if name is None else torch.device(name)
    except RuntimeError:
        raise ValueError(f"Unknown device {name!r}: take cpu, cuda, cuda:1 and the like.") from None
    if device is not None and device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"There is no device {name} here: torch sees {torch.cuda.device_count()} GPUs.")
    return device


def load_model(
    name: str = "tiny",
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    device_map: str | Mapping | None = None,
    max_memory: Mapping | None = None,
    revision: str | None = None,
):
    """A causal language model in evaluation mode, and its tokenizer.

        model, tokenizer = esparse.load_model()                                     # the embedded, trained tiny Mixtral
        model, tokenizer = esparse.load_model("mistralai/Mixtral-8x7B-v0.1", device_map="auto")

    name: "tiny" (whose experts were copied from a dense model, then trained), "tiny-scratch" (of the same shape, trained from
    nothing), a preset with random weights ("tiny-16", "tiny-32", "small-16"), a local folder, or a hub id.
    dtype: see `read_dtype`; None is float32 for the tiny models (the fastest on a CPU) and the checkpoint's own for others;
    "int8" holds every linear map and every expert matrix in 8 bits with a scale for each row, through torchao.
    A folder saved with skipping is loaded skipping. Only safetensors are read, and no remote code runs.
    Raises FileNotFoundError, PermissionError or ConnectionError if the model is not available, ValueError if transformers
    cannot load it as a language model or has no tokenizer for it, and the errors of `folder.tensors` for a local folder.
    """
    random, device = name in PRESETS and name not in SHIPPED, read_device(device)
    dtype = read_dtype(dtype, eight_bits=not random)
    source = str(data_folder() / ("tiny" if random else name) if name in PRESETS else name)
    kind = None if random else _class(source, revision)
    if (folder := local_folder(source)) is not None:
        tensors(folder)
    tokenizer = load_tokenizer(source, revision)
    if random:
        model = preset_model(name).to(dtype or torch.float32)
    else:
        options = {"device_map": device_map, "max_memory": max_memory, "revision": revision, "use_safetensors": True}
        options["dtype"] = dtype if isinstance(dtype, torch.dtype) else "float32" if name in SHIPPED else "auto"
        options |= {"quantization_config": _eight_bits()} if dtype == "int8" else {}
        model = _fetch(kind, source, **options)
        _remember_gates(model, source, revision)
        on_cpu = device is None and model.device.type == "cpu"
        if dtype in ("int8", torch.float64) or (on_cpu and model.dtype == torch.float32):
            model.set_experts_implementation("eager")  # the grouped product takes neither; in float32 a CPU is slower with it
    if device is not None:
        model = model.to(device)
    if (Path(source) / SKIPPING_FILE).exists():
        enable_skipping(model, read_betas(Path(source) / SKIPPING_FILE))
    return model.eval(), tokenizer


def _class(source: str, revision: str | None) -> type:
    """The class that loads a model: AutoModelForCausalLM, or a composite's own class if that does not know it."""
    config = read_config(described(source, revision))
    auto = transformers.AutoModelForCausalLM
    return auto if type(config) in auto._model_mapping else stock_class(config)


def _remember_gates(model, source: str, revision: str | None) -> None:
    """Where loading rounded the gates, remember their stored values, by which traces and plans identify a model."""
    gates = {p.dtype for layer in moe_blocks(model) for p in layer.gate.parameters()}
    if gates <= {torch.float32, torch.float64} or getattr(model.config, "quantization_config", None):
        return  # these dtypes hold the others exactly; quantisation leaves gates unchanged
    reader = CheckpointReader(fetch(source, revision))
    if {entry.dtype for entry in reader.entries.values()} <= {*gates, None}:
        return
    remember_stored(model, moe_blocks(model), opened(source, revision).read)


def read_betas(path: str | Path) -> list[float]:
    """One beta per MoE layer, from a JSON list or a list under "betas". Raises FileNotFoundError, or ValueError otherwise."""
    content = read_json(path, "file of betas")
    betas = content.get("betas") if isinstance(content, dict) else content
    if not isinstance(betas, list):
        raise ValueError(
            f"{path} holds no betas: it must be a list of numbers, one for each MoE layer, or have one as 'betas'."
        )
    return betas


def _eight_bits() -> transformers.TorchAoConfig:
    """torchao's weight-only int8 for linear maps and stacked experts, but not for routers and the output layer."""
    try:
        from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
    except ImportError:
        raise ImportError("dtype='int8' needs torchao beside transformers: pip install torchao.") from None
    int8, experts = Int8WeightOnlyConfig(), r"re:.*experts\.(gate_up_proj|up_proj|down_proj)"
    unchanged = ["gate", "router", "lm_head"]
    return transformers.TorchAoConfig(FqnToConfig({"_default": int8, experts: int8}), modules_to_not_convert=unchanged)


def weight_bytes(model) -> int:
    """The bytes of a model's weights in memory; 8-bit weights include their scales."""
    held = (part for p in model.parameters() for part in ((p.qdata, p.scale) if hasattr(p, "qdata") else (p,)))
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def load_tokenizer(source: str, revision: str | None = None):
    """The tokenizer of a folder or a hub id. Raises ValueError if transformers cannot load one."""
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).exists() for name in _TOKENIZERS) and not [*folder.glob("*tiktoken*")]:
        raise ValueError(_no_tokenizer(source, f"there is no {_TOKENIZERS[0]}"))
    tokenizer = _fetch(transformers.AutoTokenizer, source, revision=revision)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # some families' classes are empty without files
        raise ValueError(_no_tokenizer(source, "transformers makes an empty one of what is there"))
    return tokenizer


def _no_tokenizer(source: str, why: str) -> str:
    return (
        f"{source} has no tokenizer that can be loaded: {why}. Copy tokenizer.json and tokenizer_config.json there from the "
        "model it was made of."
    )


def _fetch(kind, source: str, **options):
    """`kind.from_pretrained`, with one-sentence errors."""
    options = {key: value for key, value in options.items() if value is not None}

    def load():
        try:
            return kind.from_pretrained(source, trust_remote_code=False, **options)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError, ImportError) as error:
            return error  # about the files, not about downloading them: `model_from_hub` must not see it

    result = load() if Path(source).is_dir() else model_from_hub(load, source)
    if not isinstance(result, Exception):
        return result
    line = (str(result).strip() or type(result).__name__).splitlines()[0]
    if isinstance(result, ImportError) or "memory" in line:
        raise result
    if kind is transformers.AutoTokenizer:
        raise ValueError(_no_tokenizer(source, _tokenizer_fault(source, line))) from result
    if "ignore_mismatched_sizes" in line:  # the line refers to a report in transformers' log
        line = "its weights are of other shapes than its config.json asks for"
    raise ValueError(f"transformers cannot load {source} as a language model: {line}") from result


def _tokenizer_fault(source: str, line: str) -> str:
    """Why transformers cannot load a tokenizer; line: its error."""
    if (Path(source) / "tokenizer.model").exists() and not (Path(source) / "tokenizer.json").exists():
        installed = {"sentencepiece": is_sentencepiece_available(), "protobuf": is_protobuf_available()}
        missing = [name for name, there in installed.items() if not there]
        return "transformers cannot read its tokenizer.model" + f" without {' and '.join(missing)}" * bool(missing)
    if line.startswith("Couldn't instantiate the backend tokenizer"):  # transformers lists packages, whatever is missing
        return "transformers finds no tokenizer.json, or one it does not read"
    return line


def card(config, experts: int, k: int, more: str) -> str:
    """The model card of a pruned model; `more` is the text after its first sentence."""
    architecture = (config.architectures or [type(config).__name__])[0]
    head = "---\nlibrary_name: transformers\ntags: [esparse, mixture-of-experts, pruned]\n---\n"
    return head + f"A {architecture} with {experts} experts per layer, of which {k} are used per token.{more}\n"


def save_model(model, tokenizer, folder: str | Path, plan: PruningPlan | None = None) -> None:
    """Save a model, pruned or not, as an ordinary folder of safetensors with a model card, which stock transformers loads.

    The betas of a skipping model are saved with it: `load_model` restores them, stock transformers ignores them.
    Raises FileExistsError if `folder` exists; after an error, nothing is left behind.
    """
    layer, more = moe_layers(model)[0], ""
    with new_folder(folder) as temporary, ExitStack() as stack:
        if plan:
            more += f" Pruned by esparse ({plan.label}); the kept experts are in `plan.json`."
            plan.save(temporary / PLAN)
        if betas := skipping_betas(model):
            more += " Made for dynamic skipping: `esparse.load_model` turns it on, stock transformers runs every expert."
            write_json(temporary / SKIPPING_FILE, {"betas": betas})
            disable_skipping(model)
            stack.callback(enable_skipping, model, betas)
        _save_published(model, temporary)
        tokenizer.save_pretrained(temporary)
        write_text(temporary / "README.md", card(model.config, layer.n, layer.k, more))


def _save_published(model, folder: Path) -> None:
    """Save the weights in the published layout, whatever layout they were read from, with a config that describes them.
    transformers decides on the layout of a quantised model."""
    quantised = getattr(model.config, "quantization_config", None) is not None
    with ExitStack() as stack:
        if not quantised and "_weight_conversions" in vars(model):
            # With these conversions transformers writes the layout that was read; without them, the published one.
            stack.callback(setattr, model, "_weight_conversions", vars(model).pop("_weight_conversions"))
        model.save_pretrained(folder)
    entries = read_json(folder / CONFIG, "model config")
    config, _ = written_config(entries, model.config, count_experts(model.config), predicting=False)
    write_json(folder / CONFIG, config | ({"quantization_config": entries["quantization_config"]} if quantised else {}))
