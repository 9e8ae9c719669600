"""Loading models and tokenizers, and saving pruned models so that stock transformers loads them."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers.utils import cached_file, is_protobuf_available, is_sentencepiece_available

from ..files import SHIPPED, data_folder, new_folder, read_json, write_json, write_text
from ..machine import free_memory
from ..moe.identity import remember_stored
from ..moe.layers import count_names, is_known, moe_blocks, moe_layers
from ..moe.published import OLD_ROPE
from ..pruning.plan import PruningPlan
from ..pruning.skipping import disable_skipping, enable_skipping, skipping_betas
from ..tiny_model.training import PRESETS, preset_model
from .folder import CONFIG, PLAN, SKIPPING_FILE, refuse_missing, tensors
from .layout import Checkpoint, count_experts, opened, stock_class, written_config
from .reader import CheckpointReader, described, fetch, model_from_hub, quantisation, read_config

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


def larger_than_memory(*sources: str | Path, dtype: torch.dtype | str | None = None, device=None) -> bool:
    """Whether checkpoints, once loaded in a dtype (None: their own), take over 0.8 of the free memory of a device (None: of
    all GPUs, or a CPU without them). A CPU holds FP8 and MXFP4 as bfloat16."""
    device, dtype = read_device(device), read_dtype(dtype, eight_bits=True)
    on_gpu = torch.cuda.is_available() and (device is None or device.type == "cuda")
    readers, size = [CheckpointReader(fetch(str(source))) for source in sources], 0
    for entry in (entry for reader in readers for entry in (reader.stored if on_gpu else reader.entries).values()):
        given = isinstance(dtype, torch.dtype) and entry.dtype and entry.dtype.is_floating_point
        size += prod(entry.shape) * dtype.itemsize if given else entry.nbytes
    return size > 0.8 * free_memory(device)


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
    kind, stored = (None, None) if random else _checked(source, revision)
    tokenizer = load_tokenizer(source, revision)
    if random:
        model = preset_model(name).to(dtype or torch.float32)
    else:
        options = {"device_map": device_map, "max_memory": max_memory, "revision": revision, "use_safetensors": True}
        options["dtype"] = dtype if isinstance(dtype, torch.dtype) else "float32" if name in SHIPPED else "auto"
        options |= {"quantization_config": _eight_bits()} if dtype == "int8" else {}
        model, report = _fetch(kind, source, output_loading_info=True, **options)
        refuse_missing(source, sorted(report["missing_keys"]), report["unexpected_keys"])
        _remember_gates(model, stored)
        on_cpu = device is None and model.device.type == "cpu"
        if dtype in ("int8", torch.float64) or (on_cpu and model.dtype == torch.float32):
            model.set_experts_implementation("eager")  # the grouped product takes neither; in float32 a CPU is slower with it
    if device is not None:
        model = model.to(device)
    if (Path(source) / SKIPPING_FILE).exists():
        enable_skipping(model, read_betas(Path(source) / SKIPPING_FILE))
    return model.eval(), tokenizer


def _checked(source: str, revision: str | None) -> tuple[type, Checkpoint | None]:
    """The class that loads a model: AutoModelForCausalLM, or a composite's own class if that does not know it. And the
    checkpoint, whose names and shapes are checked; None where it is quantised, or no MoE model."""
    config = read_config(described(source, revision))
    auto = transformers.AutoModelForCausalLM
    kind = auto if type(config) in auto._model_mapping else stock_class(config)
    if quantisation(config) or not count_names(config.get_text_config()):
        tensors(fetch(source, revision))
        return kind, None
    return kind, opened(source, revision)


def _remember_gates(model, stored: Checkpoint | None) -> None:
    """Where loading rounded the gates, remember their stored values, by which traces and plans identify a model."""
    gates = {p.dtype for layer in moe_blocks(model) for p in layer.gate.parameters()}
    if stored is None or gates <= {torch.float32, torch.float64} or getattr(model.config, "quantization_config", None):
        return  # these dtypes hold the others exactly; quantisation leaves gates unchanged
    if not {entry.dtype for entry in stored.source.entries.values()} <= {*gates, None}:
        remember_stored(model, moe_blocks(model), stored.read)


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


def write_betas(folder: Path, layers: Sequence[int], betas: Sequence[float]) -> None:
    """Write `esparse.json`: the numbers of the decoder layers that skip, and the beta of each."""
    write_json(folder / SKIPPING_FILE, {"layers": list(layers), "betas": list(betas)})


def layer_number(name: str) -> int:
    """The number of the decoder layer in the name of one of its modules, such as model.layers.3.mlp."""
    return next(int(part) for part in name.split(".") if part.isdecimal())


def card(config, experts: int, k: int, more: str) -> str:
    """The model card of a pruned model; `more` is the text after its first sentence."""
    architecture = (config.architectures or [type(config).__name__])[0]
    head = "---\nlibrary_name: transformers\ntags: [esparse, mixture-of-experts, pruned]\n---\n"
    return head + f"A {architecture} with {experts} experts per layer, of which {k} are used per token.{more}\n"


def save_model(model, tokenizer, folder: str | Path, plan: PruningPlan | None = None) -> None:
    """Save a model, pruned or not, as an ordinary folder of safetensors with a model card, which stock transformers loads.

    The betas of a skipping model are saved with it: `load_model` restores them, stock transformers ignores them.
    Raises FileExistsError if `folder` exists, ValueError for what bitsandbytes or torchao hold; after an error, nothing is
    left behind.
    """
    layer, more = moe_layers(model)[0], ""
    held = {type(p).__module__.split(".")[0] for p in model.parameters()}
    held |= {getattr(getattr(model.config, "quantization_config", None), "quant_method", None)}
    if held := held & {"bitsandbytes", "torchao"}:
        raise ValueError(
            f"{held.pop()} holds weights of this model: save it as it was before that, and quantise what was saved."
        )
    with new_folder(folder) as temporary, ExitStack() as stack:
        if plan:
            more += f" Pruned by esparse ({plan.label}); the kept experts are in `plan.json`."
            plan.save(temporary / PLAN)
        if betas := skipping_betas(model):
            more += " Made for dynamic skipping: `esparse.load_model` turns it on, stock transformers runs every expert."
            write_betas(temporary, [layer_number(moe.name) for moe in moe_layers(model)], betas)
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
    saved = read_json(folder / CONFIG, "model config")
    config, _ = written_config(_entries(model.config, saved), model.config, count_experts(model.config), predicting=False)
    write_json(folder / CONFIG, config | ({"quantization_config": saved["quantization_config"]} if quantised else {}))


def _entries(config, saved: dict) -> dict:
    """The config.json of the folder or hub id that a model was read from, with what has changed since. Without a source that
    can be read: that which transformers saved, but for a size that it derives and engines take for the size of values too."""
    missing = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
    options = {"revision": getattr(config, "_commit_hash", None), "local_files_only": True, **missing}
    path = cached_file(config._name_or_path, CONFIG, **options) if config._name_or_path else None
    source = read_json(path, "model config") if path else {}
    parts = [part for part in (source, *source.values()) if isinstance(part, dict)]
    if (entries := next((part for part in parts if part.get("model_type") == config.model_type), None)) is None:
        derived = is_known(config, "qk_rope_head_dim") and saved.get("head_dim") == saved.get("qk_rope_head_dim")
        return {name: value for name, value in saved.items() if not derived or name != "head_dim"}
    entries.pop("auto_map", None)  # code of the source, which is not saved
    whole = transformers.AutoConfig.from_pretrained(path)
    before = whole if entries is source else whole.get_text_config()
    return _updated(entries, before, config)


def _updated(entries: dict, before, now) -> dict:
    """The entries of a config.json that transformers reads as the config `before`, so that it reads them as `now`."""
    former, current = (json.loads(config.to_json_string(use_diff=False)) for config in (before, now))
    changed = {name: value for name, value in current.items() if name not in former or former[name] != value}
    removed = former.keys() - current.keys() | set(OLD_ROPE if "rope_parameters" in changed else ())
    entries = {name: value for name, value in entries.items() if name not in removed}
    aliases = {name: alias for alias, name in now.attribute_map.items() if alias in entries and name not in entries}
    for name, value in changed.items():
        if isinstance(getattr(now, name, None), transformers.PreTrainedConfig) and name in entries:
            entries[name] = _updated(entries[name], getattr(before, name), getattr(now, name))
        elif name == "dtype":
            entries |= {said: value for said in ("torch_dtype", "dtype") if said in entries}
        elif name != "transformers_version" and not name.startswith("_"):
            entries[aliases.get(name, name)] = value
    return entries
