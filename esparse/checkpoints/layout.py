"""Maps stored tensors to parameters, as stock transformers reads a folder, and cuts them when experts are removed.

A tensor has three names. Its *stored* name is the one in the folder; its *parameter* is the name in the model that stock
transformers loads; its *published* name is the one under which transformers saves the parameter, as in the hub's
checkpoints. transformers' renamings and converters map stored names to parameters, and parameters to published names.
So a folder may have any layout that transformers reads, and the result always has the published one.
"""

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import prod
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from ..moe.gates import table
from ..moe.layers import COUNT_NAMES, count_names, decoder_layers, is_known, moe_layers
from ..moe.published import published as published_entries
from ..moe.routers import pruned_table
from ..pruning.mask import cut
from ..tracing.trace import check_experts
from .folder import refuse_missing, write_tensors
from .reader import CheckpointReader, check_decoded, fetch

PREDICTING = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_num_layers")
NUMBERED = re.compile(r"(.*\.experts\.)(\d+)(\..*)")
_AUTO = (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText, transformers.AutoModelForMultimodalLM)
_TEXT = (transformers.AutoModelForCausalLM, transformers.AutoModel)  # of a composite's text part, if possible with an output


def stock_class(config) -> type:
    """The class of a whole checkpoint of this config: a causal language model, or the class that a composite config names or
    is registered for. Raises ValueError where transformers has none."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if config.get_text_config() is not config and getattr(named, "config_class", None) is type(config):
        return named
    return _class_of(config, _AUTO)


def _on_meta(kind: type, config) -> transformers.PreTrainedModel:
    """A model without weights, on the meta device."""
    with torch.device("meta"):
        return kind(config)


def _class_of(config, autos: Sequence[type]) -> type:
    """The first class that the automatic classes have for this config; for a composite, one that takes the whole config."""
    for auto in autos:
        kind = auto._model_mapping.get(type(config), None)
        if kind is not None and (config.get_text_config() is config or kind.config_class is type(config)):
            return kind
    raise ValueError(
        f"transformers {transformers.__version__} has no language model of type {config.model_type!r}: esparse works on "
        "language models with a Mixture of Experts, such as Mixtral, Qwen3-MoE or OLMoE."
    )


def with_experts(config, r: int):
    """The config of the same model with r experts a layer, and without quantisation."""
    config, n = copy.deepcopy(config), count_experts(config)
    for part in (config, config.get_text_config()):
        for name in count_names(part, n):
            setattr(part, name, r)
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def count_experts(config) -> int:
    """The number of experts per layer, from the config. Raises ValueError if it gives none."""
    text = config.get_text_config()
    if not (names := count_names(text)):
        raise ValueError(f"{type(config).__name__} counts no experts ({', '.join(COUNT_NAMES)}): this is no MoE model.")
    return getattr(text, names[0])


def expert_counts(config) -> tuple[int, int]:
    """The number of experts per layer (n) and per token (k), from the config."""
    names, text = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), config.get_text_config()
    if (k := next((value for name in names if (value := getattr(text, name, None))), None)) is None:
        raise ValueError(f"{type(config).__name__} does not say how many experts a token is routed to.")
    return count_experts(config), max(k) if isinstance(k, list) else k


def written_config(entries: dict, config, r: int, predicting: bool, quantised: bool = False) -> tuple[dict, dict[str, list]]:
    """The config.json of a pruned folder, and the changes: [before, after] by name.

    entries: the source's config.json. config: the same, as transformers reads it. Every expert count becomes r. Quantisation
    entries are dropped unless the weights stay quantised. Router logits are turned off, since they break generation with
    padded batches. The count of multi-token prediction layers becomes 0 unless these are carried (predicting). What a
    config.json that transformers 5 wrote lacks is added (`moe.published`).
    """
    entries, n, text, changed = copy.deepcopy(entries), count_experts(config), config.get_text_config(), {}
    inner = [key for key, value in entries.items() if isinstance(value, dict) and getattr(config, key, None) is text]
    for prefix, part, read in [("", entries, config), *((f"{name}.", entries[name], text) for name in inner)]:
        new = {name: r for name in COUNT_NAMES if name in part and getattr(read, name, None) == n}
        new |= {name: 0 for name in PREDICTING if part.get(name) and not predicting}
        new |= {"output_router_logits": False} if part.get("output_router_logits") else {}
        changed |= {prefix + name: [part[name], value] for name, value in new.items() if part[name] != value}
        for name in ("quantization_config", "transformers_weights")[quantised:]:
            if part.pop(name, None) is not None:
                changed[prefix + name] = ["there", "dropped"]
        part |= new
    if not any(name in part and is_known(text, name) for name in COUNT_NAMES):  # the count was transformers' default
        part[count_names(text, n)[0]] = r
    for name in inner:
        entries[name] = published_entries(entries[name], text.model_type)
    return published_entries(entries, config.model_type), changed


@dataclass
class Group:
    """Tensors that one of transformers' converters turns into one or more parameters, with a list of names for each of its
    source patterns; or one tensor that is a parameter as it is (converter None)."""

    parameter: str  # the first one made
    converter: WeightConverter | None = None
    names: dict[str | None, list[str]] = field(default_factory=dict)  # by source pattern, in transformers' order

    @property
    def all(self) -> list[str]:
        return [name for names in self.names.values() for name in names]

    def make(self, model, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters, in the dtype of the tensors that `read` returns by name."""
        if self.converter is None:
            return {self.parameter: read(self.names[None][0])}
        if (joined := self._joined(read)) is not None:
            return {self.parameter: joined}
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.names.items():
            for name in names:
                converter.add_tensor(self.parameter, name, pattern, partial(read, name))
        made = converter.convert(self.parameter, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _joined(self, read: Callable[[str], torch.Tensor]) -> torch.Tensor | None:
        """The parameter in one copy, where the converter stacks each projection of the experts, then joins the stacks; else
        None. Two copies would take twice the memory and time."""
        operations = [(type(operation), getattr(operation, "dim", None)) for operation in self.converter.operations]
        if operations != [(MergeModulelist, 0), (Concatenate, 1)]:
            return None
        columns = [self.names.get(pattern, []) for pattern in self.converter.source_patterns]
        if len({len(names) for names in columns}) != 1:
            return None  # the converter says why; so it does below
        tensors = [read(name) for names in zip(*columns, strict=True) for name in names]
        if len({tensor.shape for tensor in tensors}) != 1:
            return None
        return torch.cat(tensors).view(len(columns[0]), -1, *tensors[0].shape[1:])


def grouped(model, names: Iterable[str]) -> dict[str, Group]:
    """The groups of these names, by the first parameter of the model that each makes. A name that makes none is left out."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converter_of = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    parameters, prefix = model.state_dict(), model.base_model_prefix
    groups: dict[str, Group] = {}
    for name in sorted(names, key=dot_natural_key):
        parameter, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        if parameter not in parameters and name in parameters:
            parameter, pattern = rename_source_key(name, [], [], prefix, parameters)
        if parameter in parameters:
            group = groups.setdefault(parameter, Group(parameter, converter_of.get(pattern)))
            group.names.setdefault(pattern, []).append(name)
    return groups


class Layout:
    """The tensors that stock transformers saves for a config, with all experts and with r of them.

    composite: whether the text model is only a part of the stock model. shapes, small_shapes: by parameter, with all experts
    and with r; full, small: by published name. Raises ValueError where there are no MoE layers, or they cannot keep r experts.
    """

    def __init__(self, config, r: int):
        self.n, kind = count_experts(config), stock_class(config)
        whole = with_experts(config, self.n)
        text = whole.get_text_config()
        self.model, self.composite = _on_meta(kind, whole), text is not whole
        self.text = _on_meta(_class_of(text, _TEXT), text) if self.composite else self.model
        moe_layers(self.text)  # raises where there are none
        if r != self.n:
            check_experts(r, *expert_counts(config))
        self.small_model = self.model if r == self.n else _on_meta(kind, with_experts(config, r))
        self.shapes, self.full = _shapes(self.model)
        self.small_shapes, self.small = _shapes(self.small_model)
        self.layers = len(decoder_layers(self.text))
        self.tied = dict(getattr(self.model, "all_tied_weights_keys", None) or {})

    @cached_property
    def text_names(self) -> dict[str, str]:
        """The text model's parameters in order: from names in the stock model to names in the text model."""
        names = list(self.text.state_dict())
        if not self.composite:
            return {name: name for name in names}
        inner = self.text.base_model
        start = "" if inner is self.text else f"{self.text.base_model_prefix}."
        place = next(name for name, module in self.model.named_modules() if type(module) is type(inner))
        return {f"{place}.{name.removeprefix(start)}" if name.startswith(start) else name: name for name in names}

    @cached_property
    def stock_names(self) -> dict[str, str]:
        """The inverse of `text_names`."""
        return {text: name for name, text in self.text_names.items()}

    @cached_property
    def parameters(self) -> dict[int | None, list[str]]:
        """The text model's parameters in each decoder layer, and outside all decoder layers (None)."""
        layers = decoder_layers(self.text)
        start = next(name for name, module in self.text.named_modules() if module is layers)
        parameters = {}
        for name, text in self.text_names.items():
            inside = re.match(rf"{re.escape(start)}\.(\d+)\.", text)
            parameters.setdefault(inside and int(inside[1]), []).append(name)
        return parameters

    @cached_property
    def published(self) -> dict[str, Group]:
        """The groups of published names, by parameter."""
        return grouped(self.model, self.full)

    def published_names(self, number: int | None) -> list[str]:
        """The published names of `parameters[number]`."""
        parameters = [name for name in self.parameters[number] if name in self.published]
        return [published for name in parameters for published in self.published[name].all]

    def renamed(self, name: str, kept: Sequence[int]) -> str | None:
        """A published name's new name when only `kept` stay, or None where it is removed with its expert."""
        numbered = NUMBERED.fullmatch(name)
        if not (numbered and f"{numbered[1]}{self.n - 1}{numbered[3]}" in self.full):
            return name
        expert = int(numbered[2])
        return f"{numbered[1]}{kept.index(expert)}{numbered[3]}" if expert in kept else None

    @cached_property
    def tables(self) -> set[str]:
        """The parameters that are tables from token ids to experts."""
        places = {module: name for name, module in self.model.named_modules()}
        gates = [layer.gate for layer in moe_layers(self.model) if table(layer.gate)]
        return {f"{places[gate]}.{table(gate)}" for gate in gates}


def _shapes(model) -> list[dict[str, tuple[int, ...]]]:
    """The shapes by parameter, and by published name."""
    states = model.state_dict(), revert_weight_conversion(model, dict(model.state_dict()))
    return [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in states]


class Checkpoint:
    """A source as stock transformers reads it: its tensors, grouped by the parameters of the text model that they make.

    used: the stored names that make these. carried: names copied as they are, in a composite all others. left_out: names that
    transformers ignores, such as those of multi-token prediction layers. Raises ValueError naming a tensor that is missing, or
    whose shape or dtype does not fit, and for a quantisation that is not decoded here.
    """

    quantised = False
    write = staticmethod(write_tensors)

    def __init__(self, source: CheckpointReader, layout: Layout):
        check_decoded(source.method, source.folder)
        self.source, self.layout, self.entries = source, layout, source.entries
        groups = grouped(layout.model, source.entries)
        for target, original in layout.tied.items():  # if only one of two tied parameters is stored, take it as the original
            if original not in groups and target in groups:
                groups[original] = groups.pop(target)
                groups[original].parameter = original
        of_text = [group for name, group in groups.items() if name in layout.text_names]
        self._made: dict[str, torch.Tensor] = {}  # other parameters that the last converter made
        self.of = {name: group for group in of_text for name in self._check(group)}
        self.used = [name for group in of_text for name in group.all]
        used = set(self.used)
        others = [name for name in source.entries if name not in used]
        lacking = [name for name in layout.text_names if name not in self.of and name not in layout.tied]
        groups = [layout.published.get(name, Group(name, names={None: [name]})) for name in lacking]
        refuse_missing(source.folder, [name for group in groups for name in group.all], others)
        self.carried, self.left_out = (others, []) if layout.composite else ([], others)

    def _check(self, group: Group) -> list[str]:
        """The parameters that a group makes, tried on the meta device. ValueError where they are not those of the model."""
        entries = self.source.entries
        for name in group.all:
            entries[name].check(name, whole_numbers=group.parameter in self.layout.tables)
            self.source.parts(name)
        outline = lambda name: torch.empty(entries[name].shape, dtype=entries[name].dtype, device="meta")  # noqa: E731
        try:
            made = {name: tuple(tensor.shape) for name, tensor in group.make(self.layout.model, outline).items()}
        except (RuntimeError, ValueError, IndexError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(self._misfit(group, group.parameter, None)) from error
        for name, shape in made.items():
            if self.layout.shapes.get(name) != shape:
                raise ValueError(self._misfit(group, name, shape))
        return list(made)

    def _misfit(self, group: Group, parameter: str, shape: tuple[int, ...] | None) -> str:
        """A sentence on why a group's tensors do not make the parameter that the config asks for."""
        for name, published in self._counterparts(group):
            entry, full = self.source.entries[name], self.layout.full[published]
            if entry.shape != full:
                return f"{entry.file}: tensor {name} is of shape {list(entry.shape)}, but its config asks for {list(full)}."
        stored, wanted = group.all, self.layout.published.get(group.parameter)
        missing = [name for name in wanted.all if name not in stored] if wanted else []
        if missing and any(name in self.layout.full for name in stored):
            return f"{self.source.folder} has no tensor {missing[0]}, which its config asks for."
        asked, result = list(self.layout.shapes[group.parameter]), f"make {list(shape)}" if shape else "do not fit together"
        return (
            f"{self.source.folder}: the {len(stored)} tensors from {stored[0]} to {stored[-1]} {result}, but its config asks "
            f"for {asked} in {parameter}."
        )

    def _counterparts(self, group: Group) -> list[tuple[str, str]]:
        """Pairs of stored and published names; none if their counts or patterns differ."""
        published = self.layout.published.get(group.parameter)
        counts = lambda group: {pattern: len(names) for pattern, names in group.names.items()}  # noqa: E731
        if published is None or counts(published) != counts(group):
            return []
        return [pair for pattern, names in group.names.items() for pair in zip(names, published.names[pattern], strict=True)]

    def stored(self, number: int | None) -> list[str]:
        """The stored names in one decoder layer, or outside all decoder layers (None)."""
        return [name for group in self._groups(number) for name in group.all]

    def _groups(self, number: int | None) -> list[Group]:
        groups = [self.of[name] for name in self.layout.parameters[number] if name in self.of]
        return list({id(group): group for group in groups}.values())

    def check_finite(self) -> None:
        """Read once every weight that will be written. Raises ValueError naming the first with a NaN or an infinity."""
        weights = [*self.used, *(name for name in self.carried if self.source.entries[name].dtype)]
        for name in tqdm(weights, desc="checking weights", unit="tensor"):
            tensor = self.source.read(name)
            if not (torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all()):  # the sum is twenty times as fast
                raise ValueError(f"{self.source.entries[name].file}: tensor {name} holds NaN or infinite weights.")

    def read(self, name: str) -> torch.Tensor:
        """One parameter of the text model, in its stored dtype, by its name in the stock model or in the text model."""
        parameter = self.layout.stock_names.get(name, name)
        if parameter not in self._made:
            self._made = self.of[parameter].make(self.layout.model, self.source.read)
        return self._made.pop(parameter)

    def lazily(self, number: int | None) -> dict[str, "_Lazy"]:
        """A decoder layer's (None: the rest's) state dict by the text model's names; tensors are read when indexed."""
        names = [self.layout.text_names[name] for name in self.layout.parameters[number] if name in self.of]
        return {name: _Lazy(partial(self.read, name)) for name in names}

    def carry(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors as they are stored."""
        return {name: self.source.read(name) for name in names}

    def written(self) -> Counter[torch.dtype]:
        """The bytes that will be written in each dtype."""
        sizes = Counter()
        for name, group in self.of.items():
            dtype = self.source.entries[group.all[0]].dtype
            sizes[dtype] += prod(self.layout.small_shapes[name]) * dtype.itemsize
        for entry in map(self.source.entries.get, self.carried):
            sizes[entry.dtype or torch.uint8] += entry.nbytes
        return sizes

    def pruned(self, number: int | None, kept: Sequence[int]) -> dict[str, torch.Tensor]:
        """A decoder layer (None: the rest) with only the kept experts: tensors by published name, in their stored dtype.

        Stored tensors that match published ones in number and shape are cut one by one. In any other layout, such as stacked
        experts or transposed ones under the same names, the parameters are made, cut and converted back.
        """
        state, others = {}, {}
        for group in self._groups(number):
            pairs = self._counterparts(group)
            if pairs and all(self.source.entries[name].shape == self.layout.full[published] for name, published in pairs):
                for name, published in pairs:
                    if new := self.layout.renamed(published, kept):
                        state[new] = self._cut(self.source.read(name), group, self.layout.small[new], kept)
            else:
                made = group.make(self.layout.model, self.source.read)
                shapes = self.layout.small_shapes
                others |= {name: self._cut(tensor, group, shapes[name], kept) for name, tensor in made.items()}
        return state | revert_weight_conversion(self.layout.small_model, others)

    def _cut(self, tensor: torch.Tensor, group: Group, shape: Sequence[int], kept: Sequence[int]) -> torch.Tensor:
        """A tensor without the experts that are removed, which then has this shape."""
        if group.parameter in self.layout.tables and kept:
            tensor = pruned_table(tensor, kept, self.layout.n)
        axis = next((axis for axis, size in enumerate(shape) if size != tensor.shape[axis]), None)
        return tensor if axis is None else cut(tensor, axis, kept, self.layout.n)


@dataclass
class _Lazy:
    """Stands for a tensor, which is read when transformers indexes it."""

    read: Callable[[], torch.Tensor]

    def __getitem__(self, _) -> torch.Tensor:
        return self.read()


def opened(source: str | Path, revision: str | None = None, r: int | None = None) -> Checkpoint:
    """The checkpoint of a folder or hub id, to be cut to r experts a layer (None: all stay). Raises what `fetch`,
    `CheckpointReader`, `Layout` and `Checkpoint` do."""
    reader = CheckpointReader(fetch(str(source), revision))
    return Checkpoint(reader, Layout(reader.config, count_experts(reader.config) if r is None else r))
