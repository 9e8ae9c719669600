"""What the families' published config.json says beside what transformers 5 writes. Engines read it: without it they refuse a
model, or compute another one."""

from collections.abc import Callable
from contextlib import suppress

# The count's published name, where transformers writes another.
COUNTS = dict.fromkeys(("qwen3_moe", "qwen3_vl_moe_text", "mellum", "kolibri1"), ("num_local_experts", "num_experts"))

# The architecture's published name, likewise: engines know no other.
ARCHITECTURES = {"phimoe": "PhiMoEForCausalLM"}

OLD_ROPE = ("rope_theta", "partial_rotary_factor", "rope_scaling")  # what was outside rope_parameters before transformers 5

Fact = object | Callable[[dict], object]  # a value, or a function of the other entries


def _head(entries: dict) -> int:
    return entries.get("head_dim") or entries["hidden_size"] // entries["num_attention_heads"]


def _interval(entries: dict) -> int:
    """Every how many layers attention is full; 4, the published value, if none is."""
    kinds = entries["layer_types"]
    return kinds.index("full_attention") + 1 if "full_attention" in kinds else 4


_BIASED = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
FACTS: dict[str, dict[str, Fact]] = {
    "deepseek_v2": {"scoring_func": "softmax", "topk_method": "greedy", "moe_layer_freq": 1},
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"), _BIASED),
    "glm4_moe": {"head_dim": _head, "rope_scaling": None},
    "qwen3_moe": {"head_dim": _head},
    "qwen3_next": {"full_attention_interval": _interval},
    "qwen3_5_moe_text": {"full_attention_interval": _interval},
    "minimax_m2": {
        "rotary_dim": lambda entries: round(_head(entries) * entries.get("partial_rotary_factor", 1)),
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "use_routing_bias": True,
        "use_qk_norm": True,
    },
    "exaone_moe": {
        "head_dim": _head,
        "is_moe_layer": lambda entries: [kind == "sparse" for kind in entries["mlp_layer_types"]],
    },
}


def published(entries: dict, kind: str) -> dict:
    """The entries of a config.json, or of its text part, with those that the published ones of this model type also have.

    Only what is missing is added, and a count has its published name. From `rope_parameters` that hold for all layers,
    `rope_theta`, `partial_rotary_factor` and `rope_scaling` are also written where they were before transformers 5.
    """
    own, other = COUNTS.get(kind, ("", ""))
    entries = {other if name == own and other not in entries else name: value for name, value in entries.items()}
    if kind in ARCHITECTURES:
        entries["architectures"] = [ARCHITECTURES[kind]]
    rope = entries.get("rope_parameters") or {}
    if "rope_theta" in rope:
        outer = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        if rope.get("rope_type", "default") != "default":
            outer["rope_scaling"] = {name: value for name, value in rope.items() if name not in outer}
        entries |= {name: value for name, value in outer.items() if entries.get(name) is None}
    for name, fact in FACTS.get(kind, {}).items():
        with suppress(KeyError):  # of an entry that the fact follows from, and that is left to transformers' default
            entries.setdefault(name, fact(entries) if callable(fact) else fact)
    return entries
