"""Which stored tensors make which parameter, as stock transformers reads a folder, and what each becomes when experts go.

Three names meet here. A *stored* name is a tensor's in the folder; a *parameter* is its place in the model that stock
transformers loads; a *published* name is what transformers writes that parameter under, the layout of the hub's
checkpoints. transformers' own renamings and converters lead from stored names to parameters and from there to published
names, so a folder may have any layout that it accepts, and what is written always has the published one.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from .folder import side_files
from .models import COUNT_NAMES, count_names, decoder_layers, is_known, moe_layers
from .pruning import cut
from .routers import pruned_table, table
from .shards import Source
from .traces import check_experts

PREDICTING = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_num_layers")
_NUMBERED = re.compile(r"(.*\.experts\.)(\d+)(\..*)")
_AUTO = (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText, transformers.AutoModelForMultimodalLM)


# --- models without weights -----------------------------------------------------------------------------------------


def text_model(config) -> transformers.PreTrainedModel:
    """The language model of a config, or of the text part of a composite one, without any weights. It has an output layer
    where transformers has a class with one; tracing needs none."""
    config = config.get_text_config()
    kind = _class_of(config, (transformers.AutoModelForCausalLM, transformers.AutoModel))
    with torch.device("meta"):
        return kind(config)


def stock_model(config) -> transformers.PreTrainedModel:
    """The model that stock transformers loads a whole checkpoint of this config as, without any weights."""
    with torch.device("meta"):
        return stock_class(config)(config)


def stock_class(config) -> type:
    """The class of a whole checkpoint of this config: a causal language model, or for a composite config the class that it
    names or is registered for. Raises ValueError where transformers has none."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if config.get_text_config() is not config and getattr(named, "config_class", None) is type(config):
        return named
    return _class_of(config, _AUTO)


def _class_of(config, autos: Sequence[type]) -> type:
    """The first class that one of transformers' automatic classes makes of this config, of a composite one of it whole."""
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
    config = copy.deepcopy(config)
    n = count_experts(config)
    for part in (config, config.get_text_config()):
        for name in count_names(part, n):
            setattr(part, name, r)
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def count_experts(config) -> int:
    """The experts a layer has by its config. Raises ValueError where it counts none."""
    counts = [getattr(config.get_text_config(), name) for name in count_names(config.get_text_config())]
    if not counts:
        raise ValueError(f"{type(config).__name__} counts no experts ({', '.join(COUNT_NAMES)}): this is no MoE model.")
    return counts[0]


def expert_counts(config) -> tuple[int, int]:
    """The experts of a layer, and those a token is routed to, by the config."""
    text = config.get_text_config()
    names = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
    k = next((value for name in names if (value := getattr(text, name, None))), None)
    if k is None:
        raise ValueError(f"{type(config).__name__} does not say how many experts a token is routed to.")
    return count_experts(config), max(k) if isinstance(k, list) else k


def written_config(entries: dict, config, r: int, predicting: bool) -> tuple[dict, dict[str, list]]:
    """The config.json of a pruned folder from the one of its source, and what changed: [before, after] by name.

    config: what transformers makes of `entries`. Every name of the count of experts says r, weights are not quantised, and
    router logits are not asked for: with padded batches they break generation. Layers that predict further tokens are
    counted only where they were carried (predicting).
    """
    entries, n, changed = copy.deepcopy(entries), count_experts(config), {}
    for where, part, of in _text_parts(entries, config):
        new = {name: r for name in COUNT_NAMES if name in part and getattr(of, name, None) == n}
        new |= {name: 0 for name in PREDICTING if part.get(name) and not predicting}
        new |= {"output_router_logits": False} if part.get("output_router_logits") else {}
        changed |= {where + name: [part[name], value] for name, value in new.items() if part[name] != value}
        if part.pop("quantization_config", None) is not None:
            changed[f"{where}quantization_config"] = ["there", "dropped"]
        part |= new
    last, text = part, config.get_text_config()
    if not any(name in last and is_known(text, name) for name in COUNT_NAMES):  # the count was transformers' default
        last[count_names(text, n)[0]] = r
    if entries.pop("transformers_weights", None) is not None:
        changed["transformers_weights"] = ["there", "dropped"]
    return entries, changed


def _text_parts(entries: dict, config) -> Iterator[tuple[str, dict, object]]:
    """A config and, in a composite, its text part: the prefix of its names, its JSON, what transformers makes of it."""
    yield "", entries, config
    text = config.get_text_config()
    for name, value in entries.items():
        if text is not config and isinstance(value, dict) and getattr(config, name, None) is text:
            yield f"{name}.", value, text


# --- names ----------------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """Names of tensors that make one parameter, or several: by one of transformers' converters, whose source patterns each
    collect a list, or alone and as they are (converter None)."""

    parameter: str  # the first that it makes
    converter: WeightConverter | None = None
    names: dict[str | None, list[str]] = field(default_factory=dict)  # by source pattern, in transformers' order

    @property
    def all(self) -> list[str]:
        """Every name, whatever its pattern."""
        return [name for names in self.names.values() for name in names]

    def make(self, model, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters, from the tensors that `read` gives, in their own dtype."""
        if self.converter is None:
            return {self.parameter: read(self.names[None][0])}
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.names.items():
            for name in names:
                converter.add_tensor(self.parameter, name, pattern, partial(read, name))
        made = converter.convert(self.parameter, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def grouped(model, names: Iterable[str]) -> dict[str, Group]:
    """Which of these names make which parameter of the model, by its first one. Names that make none are in no group."""
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
    """What stock transformers writes for a config, and what of it stays when r experts are kept.

    composite: whether the text model is a part of what stock transformers loads. full and small: shapes by published name,
    with all experts and with r. shapes: of the stock model's parameters. Raises ValueError for the config of a model
    without MoE layers, or with one that cannot keep r experts.
    """

    def __init__(self, config, r: int):
        self.n, self.composite = count_experts(config), config.get_text_config() is not config
        self.model = stock_model(with_experts(config, self.n))
        self.text = text_model(with_experts(config, self.n)) if self.composite else self.model
        moe_layers(self.text)  # or says that there are none
        if r != self.n:
            check_experts(r, *expert_counts(config))
        self.small_model = self.model if r == self.n else stock_model(with_experts(config, r))
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        self.full, self.small = _written(self.model), _written(self.small_model)
        self.layers = len(decoder_layers(self.text))
        self.tied = dict(getattr(self.model, "all_tied_weights_keys", None) or {})

    @cached_property
    def text_names(self) -> dict[str, str]:
        """The parameters of the text model: by their names in the stock model, in order, their names in the text model."""
        names = list(self.text.state_dict())
        if not self.composite:
            return {name: name for name in names}
        inner = self.text.base_model
        start = "" if inner is self.text else f"{self.text.base_model_prefix}."
        place = next(name for name, module in self.model.named_modules() if type(module) is type(inner))
        return {f"{place}.{name.removeprefix(start)}" if name.startswith(start) else name: name for name in names}

    def parameters(self, number: int | None) -> list[str]:
        """The text model's parameters in one decoder layer, or outside of all (None)."""
        return [name for name, of in self._layer_of.items() if of == number]

    @cached_property
    def _layer_of(self) -> dict[str, int | None]:
        layers = decoder_layers(self.text)
        start = next(name for name, module in self.text.named_modules() if module is layers) + "."
        inside = {name: text.startswith(start) for name, text in self.text_names.items()}
        return {
            name: int(text.removeprefix(start).split(".")[0]) if inside[name] else None
            for name, text in self.text_names.items()
        }

    @cached_property
    def published(self) -> dict[str, Group]:
        """The published names that make each parameter."""
        return grouped(self.model, self.full)

    def published_names(self, number: int | None) -> list[str]:
        """The published names of the text model's parameters in one decoder layer, or outside of all (None)."""
        groups = (self.published.get(parameter) for parameter in self.parameters(number))
        return [name for group in groups if group for name in group.all]

    def cut(self, name: str, kept: Sequence[int]) -> tuple[str | None, int | None]:
        """A published name's new one (None, where it goes with its expert), and the axis to cut to the kept experts (or
        None)."""
        numbered = _NUMBERED.fullmatch(name)
        if numbered and f"{numbered[1]}{self.n - 1}{numbered[3]}" in self.full:
            expert = int(numbered[2])
            return (f"{numbered[1]}{kept.index(expert)}{numbered[3]}", None) if expert in kept else (None, None)
        return name, _other_axis(self.full[name], self.small[name])

    @cached_property
    def tables(self) -> set[str]:
        """The parameters that look up experts by token id."""
        places = {module: name for name, module in self.model.named_modules()}
        gates = [layer.gate for layer in moe_layers(self.model) if table(layer.gate)]
        return {f"{places[gate]}.{table(gate)}" for gate in gates}

    @cached_property
    def axes(self) -> dict[str, int | None]:
        """The axis of each parameter that counts experts, or None."""
        small = self.small_model.state_dict()
        return {name: _other_axis(shape, small[name].shape) for name, shape in self.shapes.items()}


def _other_axis(full: Sequence[int], small: Sequence[int]) -> int | None:
    return next((axis for axis, (one, other) in enumerate(zip(full, small, strict=True)) if one != other), None)


def _written(model) -> dict[str, tuple[int, ...]]:
    state = revert_weight_conversion(model, dict(model.state_dict()))
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


# --- a folder, read as the model --------------------------------------------------------------------------------------


class Checkpoint:
    """A source as stock transformers reads it: its tensors by the parameters of the text model that they make.

    Raises ValueError naming a tensor that is missing, of another shape or of a dtype that holds no weights.
    """

    def __init__(self, source: Source, layout: Layout):
        self.source, self.layout = source, layout
        found = grouped(layout.model, source.entries)
        self._move_tied(found)
        self.groups = {name: group for name, group in found.items() if name in layout.text_names}
        self._made: dict[str, torch.Tensor] = {}  # by the same converter as what was asked for
        self.of = {name: group for group in self.groups.values() for name in self._check(group)}
        for name in layout.text_names:
            if name not in self.of and name not in layout.tied:
                raise ValueError(f"{source.folder} has no tensor {self._published(name)}, which its config asks for.")

    def _move_tied(self, found: dict[str, Group]) -> None:
        """Where one of two tied parameters is stored, that is the one the other is tied to."""
        for target, original in self.layout.tied.items():
            if original not in found and target in found:
                found[original] = found.pop(target)
                found[original].parameter = original

    def _published(self, parameter: str) -> str:
        group = self.layout.published.get(parameter)
        return parameter if group is None else group.all[0]

    def _check(self, group: Group) -> list[str]:
        """The parameters that a group makes, if they are those of the model."""
        for name in group.all:
            self.source.entries[name].check(name, whole_numbers=group.parameter in self.layout.tables)
        made = self._outline(group)
        for name, shape in made.items():
            if self.layout.shapes.get(name) != shape:
                raise ValueError(self._unfit(group, name, shape))
        return list(made)

    def _outline(self, group: Group) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters that a group makes."""
        entries = self.source.entries
        outline = lambda name: torch.empty(entries[name].shape, dtype=entries[name].dtype, device="meta")  # noqa: E731
        try:
            return {name: tuple(made.shape) for name, made in group.make(self.layout.model, outline).items()}
        except (RuntimeError, ValueError, IndexError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(self._unfit(group, group.parameter, None)) from error

    def _unfit(self, group: Group, parameter: str, shape: tuple[int, ...] | None) -> str:
        """What keeps a group's tensors from making the parameter that the config asks for."""
        for name, published in self._counterparts(group):
            entry, full = self.source.entries[name], self.layout.full[published]
            if entry.shape != full:
                return f"{entry.file}: tensor {name} is of shape {list(entry.shape)}, but its config asks for {list(full)}."
        stored, wanted = group.all, self.layout.published.get(group.parameter)
        lacking = [name for name in wanted.all if name not in stored] if wanted else []
        if lacking and any(name in self.layout.full for name in stored):
            return f"{self.source.folder} has no tensor {lacking[0]}, which its config asks for."
        asked, gives = list(self.layout.shapes[group.parameter]), f"make {list(shape)}" if shape else "do not fit together"
        return (
            f"{self.source.folder}: the {len(stored)} tensors from {stored[0]} to {stored[-1]} {gives}, but its config asks "
            f"for {asked} in {parameter}."
        )

    def _pairs(self, group: Group) -> list[tuple[str, str]]:
        """Stored names with the published names that they stand for; none where the folder has another layout, be it one of
        the same names, such as experts stored transposed."""
        pairs = self._counterparts(group)
        alike = all(self.source.entries[stored].shape == self.layout.full[published] for stored, published in pairs)
        return pairs if alike else []

    def _counterparts(self, group: Group) -> list[tuple[str, str]]:
        """Stored names with the published names in their place, none where those are others or of another number."""
        published = self.layout.published.get(group.parameter)
        counts = lambda group: {pattern: len(names) for pattern, names in group.names.items()}  # noqa: E731
        if published is None or counts(published) != counts(group):
            return []
        return [pair for pattern, names in group.names.items() for pair in zip(names, published.names[pattern], strict=True)]

    @cached_property
    def side_files(self) -> tuple[list[str], dict[str, str]]:
        """What is copied beside the weights, and what is left behind, with why."""
        return side_files(self.source.folder, same_experts=self.layout.small_model is self.layout.model)

    @cached_property
    def used(self) -> list[str]:
        """The stored names that make a parameter of the text model."""
        return [name for group in self.groups.values() for name in group.all]

    @cached_property
    def _others(self) -> list[str]:
        used = set(self.used)
        return [name for name in self.source.entries if name not in used]

    @property
    def carried(self) -> list[str]:
        """The stored names that are copied as they are: in a composite all that the text model is not made of."""
        return self._others if self.layout.composite else []

    @property
    def left_out(self) -> list[str]:
        """The stored names that transformers ignores, such as those of layers that predict further tokens."""
        return [] if self.layout.composite else self._others

    def stored(self, number: int | None) -> list[str]:
        """The stored names that a decoder layer is made of, or what is outside of all (None)."""
        return [name for group in self._groups(self.layout.parameters(number)) for name in group.all]

    def _groups(self, parameters: Iterable[str]) -> list[Group]:
        return list({id(group): group for name in parameters if (group := self.of.get(name))}.values())

    def announce(self, number: int) -> None:
        """Say that a decoder layer is wanted soon, see `Source.announce`."""
        self.source.announce(self.stored(number))

    def check_finite(self) -> None:
        """Read every weight that will be written once. Raises ValueError naming the first that holds a NaN or an infinity."""
        self.source.check_finite([*self.used, *(name for name in self.carried if self.source.entries[name].dtype)])

    def read(self, parameter: str) -> torch.Tensor:
        """One parameter of the text model, in the dtype it is stored in."""
        if parameter not in self._made:
            self._made = self.of[parameter].make(self.layout.model, self.source.read)
        return self._made.pop(parameter)

    def read_text(self, name: str) -> torch.Tensor:
        """The same by the parameter's name in the text model."""
        return self.read(self._parameter_of[name])

    @cached_property
    def _parameter_of(self) -> dict[str, str]:
        return {text: name for name, text in self.layout.text_names.items()}

    def dtype(self, parameter: str) -> torch.dtype:
        """The dtype that a parameter is stored in."""
        return self.source.entries[self.of[parameter].all[0]].dtype

    def lazily(self, number: int | None) -> dict[str, "_Lazy"]:
        """A decoder layer's state dict (or the rest's), by the text model's names, read when transformers asks for it."""
        names = self.layout.text_names
        return {names[name]: _Lazy(self, name) for name in self.layout.parameters(number) if name in self.of}

    def written(self) -> Iterator[tuple[torch.dtype, float]]:
        """The dtype and bytes of everything that will be written, tensor by tensor."""
        small = self.layout.small_model.state_dict()
        for name in self.of:
            yield self.dtype(name), small[name].numel() * self.dtype(name).itemsize
        for name in self.carried:
            yield self.source.entries[name].dtype or torch.int64, self.source.nbytes(name)

    def pruned(self, number: int | None, kept: Sequence[int]) -> dict[str, torch.Tensor]:
        """A decoder layer (or the rest) as the smaller model has it: tensors by published name, in their stored dtype."""
        state, others = {}, {}
        for group in self._groups(self.layout.parameters(number)):
            if pairs := self._pairs(group):
                state |= dict(self._cut(group, pairs, kept))
            else:
                made = group.make(self.layout.model, self.source.read)
                others |= {name: self._smaller(tensor, group, self.layout.axes[name], kept) for name, tensor in made.items()}
        return state | revert_weight_conversion(self.layout.small_model, others)

    def _cut(self, group: Group, pairs: Sequence[tuple[str, str]], kept: Sequence[int]) -> Iterator[tuple[str, torch.Tensor]]:
        for stored, published in pairs:
            new, axis = self.layout.cut(published, kept)
            if new is not None:
                yield new, self._smaller(self.source.read(stored), group, axis, kept)

    def _smaller(self, tensor: torch.Tensor, group: Group, axis: int | None, kept: Sequence[int]) -> torch.Tensor:
        if group.parameter in self.layout.tables and kept:
            tensor = pruned_table(tensor, kept, self.layout.n)
        return tensor if axis is None else cut(tensor, axis, kept, self.layout.n)


@dataclass
class _Lazy:
    """What transformers takes for a tensor in a file: nothing is read before it is asked for."""

    checkpoint: Checkpoint
    parameter: str

    def __getitem__(self, _everything) -> torch.Tensor:
        return self.checkpoint.read(self.parameter)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.checkpoint.layout.shapes[self.parameter]

    @property
    def dtype(self) -> torch.dtype:
        return self.checkpoint.dtype(self.parameter)

    def get_shape(self) -> list[int]:
        return list(self.shape)
