"""Loading models, and saving pruned ones so that stock transformers can load them."""

from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from .files import data_folder, local_folder, new_folder, read_json, write_json, write_text
from .folder import CONFIG, PLAN, SKIPPING_FILE, tensors
from .layout import Checkpoint, Layout, count_experts, stock_class, written_config
from .models import moe_blocks, moe_layers, remember_stored
from .pruning import PruningPlan
from .shards import Source, described, fetch, model_from_hub, read_config
from .skips import disable_skipping, enable_skipping, skipping_betas
from .training import PRESETS, preset_model

_DTYPES = {
    torch.bfloat16: ("bfloat16", "bf16"),
    torch.float16: ("float16", "fp16", "half"),
    torch.float32: ("float32", "fp32", "float"),
    torch.float64: ("float64", "fp64", "double"),
}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tekken.json")


def read_dtype(name: torch.dtype | str | None, *, eight_bits: bool = False) -> torch.dtype | str | None:
    """The dtype that a name means, such as torch.bfloat16 for "bf16"; None for None and "auto": the checkpoint's own.

    eight_bits: whether "int8" may be asked, which comes back as it is. Raises ValueError for any other name.
    """
    word = str(name).removeprefix("torch.").lower()
    if word in ("none", "auto"):
        return None
    if word == "int8" and eight_bits:
        return word
    found = next((dtype for dtype, names in _DTYPES.items() if word in names), None)
    if found is None:
        known = ", ".join(names[0] for names in _DTYPES.values()) + ", auto" + ", int8" * eight_bits
        raise ValueError(f"Unknown dtype {name!r}: take one of {known}.")
    return found


def read_device(name: torch.device | str | None) -> torch.device | None:
    """The device of that name. Raises ValueError for a name that torch does not know, and for a GPU that is not there."""
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

    name: "tiny", a preset with random weights ("tiny-16", "tiny-32", "small-16"), a local folder, or a hub id.
    dtype: see `read_dtype`; None means float32 for the tiny models (the fastest on a CPU) and the checkpoint's own for
    others; "int8" puts every linear map and every expert matrix into 8 bits with a scale for each row, through transformers'
    torchao support.
    A folder saved with skipping comes back skipping. Only safetensors are read and no remote code runs.
    Raises FileNotFoundError, PermissionError or ConnectionError where the model cannot be had, ValueError where transformers
    cannot load it as a language model or has no tokenizer for it, and what `folder.tensors` does for a local folder.
    """
    made, device = name in PRESETS and name != "tiny", read_device(device)
    dtype = read_dtype(dtype, eight_bits=not made)
    source = str(data_folder() / "tiny" if made or name == "tiny" else name)
    kind = None if made else _kind(source, revision)
    if (folder := local_folder(source)) is not None:
        tensors(folder)
    tokenizer = load_tokenizer(source, revision)
    if made:
        model = preset_model(name).to(dtype or torch.float32)
    else:
        kept = None if dtype == "int8" else dtype
        options = {"dtype": kept or ("float32" if name == "tiny" else "auto"), "revision": revision}
        options |= {"quantization_config": _eight_bits() if dtype == "int8" else None}
        options |= {"device_map": device_map, "max_memory": max_memory, "use_safetensors": True}
        model = _fetch(kind, source, **options)
        _remember_gates(model, source, revision)
        if dtype in ("int8", torch.float64):
            model.set_experts_implementation("eager")  # no grouped product takes them
    if device is not None:
        model = model.to(device)
    if (Path(source) / SKIPPING_FILE).exists():
        enable_skipping(model, read_betas(Path(source) / SKIPPING_FILE))
    return model.eval(), tokenizer


def _kind(source: str, revision: str | None) -> type:
    """What loads a model: transformers' class for causal language models, or for a composite that it does not know the
    composite's own."""
    config = read_config(described(source, revision))
    auto = transformers.AutoModelForCausalLM
    return auto if type(config) in auto._model_mapping else stock_class(config)


def _remember_gates(model, source: str, revision: str | None) -> None:
    """Where loading has rounded the gates, let them know what they are as stored."""
    gates = {p.dtype for layer in moe_blocks(model) for p in layer.gate.parameters()}
    if gates <= {torch.float32, torch.float64} or getattr(model.config, "quantization_config", None):
        return  # these dtypes hold the others exactly; quantisation leaves gates as they are
    found = Source(fetch(source, revision))
    if {entry.dtype for entry in found.entries.values()} <= {*gates, None}:
        return
    opened = Checkpoint(found, Layout(found.config, count_experts(found.config)))
    remember_stored(model, moe_blocks(model), opened.read if type(model) is type(opened.layout.model) else opened.read_text)


def read_betas(path: str | Path) -> list[float]:
    """One beta per MoE layer, from a JSON list or one under "betas". Raises FileNotFoundError, or ValueError for another."""
    found = read_json(path, "file of betas")
    betas = found.get("betas") if isinstance(found, dict) else found
    if not isinstance(betas, list):
        raise ValueError(
            f"{path} holds no betas: it must be a list of numbers, one for each MoE layer, or have one as 'betas'."
        )
    return betas


def _eight_bits() -> transformers.TorchAoConfig:
    """torchao's weight-only int8 for linear maps and stacked experts; routers and the output layer stay as they are."""
    try:
        from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
    except ImportError:
        raise ImportError("dtype='int8' needs torchao beside transformers: pip install torchao.") from None
    kind = Int8WeightOnlyConfig()
    experts = r"re:.*experts\.(gate_up_proj|up_proj|down_proj)"
    stay = ["gate", "router", "lm_head"]
    return transformers.TorchAoConfig(FqnToConfig({"_default": kind, experts: kind}), modules_to_not_convert=stay)


def weight_bytes(model) -> int:
    """The bytes of a model's weights as they are held: of 8-bit ones, theirs and those of their scales."""
    held = (part for p in model.parameters() for part in ((p.qdata, p.scale) if hasattr(p, "qdata") else (p,)))
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def load_tokenizer(source: str, revision: str | None = None):
    """The tokenizer of a folder or a hub id. Raises ValueError where there is none that transformers can load."""
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).exists() for name in _TOKENIZERS) and not [*folder.glob("*tiktoken*")]:
        raise ValueError(_no_tokenizer(source, f"there is no {_TOKENIZERS[0]}"))
    tokenizer = _fetch(transformers.AutoTokenizer, source, revision=revision)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what some families' classes make of nothing
        raise ValueError(_no_tokenizer(source, "transformers makes an empty one of what is there"))
    return tokenizer


def _no_tokenizer(source: str, why: str) -> str:
    return (
        f"{source} has no tokenizer that can be loaded: {why}. Copy tokenizer.json and tokenizer_config.json there from the "
        "model it was made of."
    )


def _fetch(kind, source: str, **options):
    """`kind.from_pretrained`, with one sentence where that fails."""
    options = {key: value for key, value in options.items() if value is not None}
    language_model = kind is not transformers.AutoTokenizer

    def load():
        try:
            return kind.from_pretrained(source, trust_remote_code=False, **options)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError, ImportError) as error:
            return error  # of what is there, not of getting it

    found = load() if Path(source).is_dir() else model_from_hub(load, source)
    if not isinstance(found, Exception):
        return found
    line = (str(found).strip() or type(found).__name__).splitlines()[0]
    if isinstance(found, ImportError) or "memory" in line:
        raise found
    if "ignore_mismatched_sizes" in line:  # and points at a report in its log
        line = "its weights are of other shapes than its config.json asks for"
    told = f"transformers cannot load {source} as a language model: {line}" if language_model else _why_none(source, line)
    raise ValueError(told) from found


def _why_none(source: str, line: str) -> str:
    """What is wrong with the tokenizer of a folder or a hub id, of which transformers says this."""
    if line.startswith("Couldn't instantiate the backend tokenizer"):  # and goes on about packages, whatever is missing
        line = "transformers finds no tokenizer.json, or one it does not read"
    if (Path(source) / "tokenizer.model").exists() and not (Path(source) / "tokenizer.json").exists():
        there = {"sentencepiece": is_sentencepiece_available(), "protobuf": is_protobuf_available()}
        lacking = [name for name, found in there.items() if not found]
        line = "transformers cannot read its tokenizer.model" + f" without {' and '.join(lacking)}" * bool(lacking)
    return _no_tokenizer(source, line)


_CARD = """\
---
library_name: transformers
tags: [esparse, mixture-of-experts, pruned]
---
A {architecture} with {experts} experts per layer, of which {k} are used per token.{more}
"""


def card(config, experts: int, k: int, more: str) -> str:
    """The model card of a pruned model."""
    architecture = (config.architectures or [type(config).__name__])[0]
    return _CARD.format(architecture=architecture, experts=experts, k=k, more=more)


def save_model(model, tokenizer, folder: str | Path, plan: PruningPlan | None = None) -> None:
    """Save a model, pruned or not, as an ordinary folder of safetensors that stock transformers loads.

    A model card says what was done. Betas of a skipping model are kept beside it: `load_model` restores them, stock
    transformers ignores them. Raises FileExistsError if `folder` exists; nothing is left behind on an error.
    """
    betas = skipping_betas(model)
    layer = moe_layers(model)[0]
    done = f" Pruned by esparse (method: {plan.method}, r = {plan.r}); the kept experts are in `plan.json`." if plan else ""
    skips = (
        " Made for dynamic skipping: `esparse.load_model` turns it on, stock transformers runs every expert." if betas else ""
    )
    with new_folder(folder) as temporary:
        if betas:
            disable_skipping(model)
        try:
            _save_published(model, temporary)
        finally:
            if betas:
                enable_skipping(model, betas)
        tokenizer.save_pretrained(temporary)
        write_text(temporary / "README.md", card(model.config, layer.n, layer.k, done + skips))
        if betas:
            write_json(temporary / SKIPPING_FILE, {"betas": betas})
        if plan:
            plan.save(temporary / PLAN)


def _save_published(model, folder: Path) -> None:
    """Weights in the published layout, whatever layout they were read from, and a config that describes just them. Those of a
    model that is held quantised are stored as transformers stores them."""
    quantised = getattr(model.config, "quantization_config", None) is not None
    # without it transformers writes what it writes for a new model
    read_by = None if quantised else vars(model).pop("_weight_conversions", None)
    try:
        model.save_pretrained(folder)
    finally:
        if read_by is not None:
            model._weight_conversions = read_by
    entries = read_json(folder / CONFIG, "model config")
    config, _ = written_config(entries, model.config, count_experts(model.config), predicting=False)
    write_json(folder / CONFIG, config | ({"quantization_config": entries["quantization_config"]} if quantised else {}))
