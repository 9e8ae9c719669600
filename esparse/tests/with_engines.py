"""Serving engines on full and pruned folders, against stock transformers in float32. `.ci/engines` runs it:

    python -m esparse.tests.with_engines [--families NAME...] [--update] ENGINE...

Every family's small model with random weights is written as a full folder with a published config, pruned from disk, and
pruned in memory and saved. Each engine generates 64 tokens greedily after each of 5 prompts. A cell passes where its tokens
are those of transformers, and their log-probabilities too. vLLM has two more, which esparse's plug-in must make equal to
esparse: a pruned model that skips, dropping the same share of pairs in each layer, and one with betas of 0. Exits with 1 where
a full model passes and another does not.
"""

import argparse
import datetime
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config
from transformers.utils import logging

import esparse
from esparse.checkpoints.models import load_tokenizer
from esparse.files import checkout, data_folder, read_json, versions, write_json
from esparse.moe.layers import COUNT_NAMES
from esparse.pruning.skipping import skipped_shares
from esparse.tests.engine import ENGINES, NEW
from esparse.tests.families import OWN, drawn, generic

BOUND = 1e-3  # on log-probabilities. Where the likeliest two tokens are nearer to each other than that, either will do.
EXPERTS, KEPT, WAYS = 8, 6, ("full", "disk", "memory")
SKIPPING = {"skipping": 0.99, "zero": 0.0}  # of the median betas: at a median, rounding would decide about a pair
PACKED = "_mxfp4"  # ends the name of a family whose experts are stored in MXFP4
LEFT_OUT = {("llama.cpp", "dots1")}  # the engine's process ends
ROPE = {"rope_type": "default", "rope_theta": 5e4}  # no engine's default, so that one that overlooks it is caught
SHAPE = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "num_attention_heads": 2,
         "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "initializer_range": 0.2, "use_cache": True,
         "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32,
         "rope_parameters": ROPE}  # fmt: skip


def rope(**changes) -> dict:
    return {"rope_parameters": ROPE | changes}


_YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
# mlx-lm and llama.cpp round YaRN's bounds, which the published config forbids ("truncate"). With these they are 4 and 12.
_WHOLE = {
    name: 4096 / (2 * math.pi) * ROPE["rope_theta"] ** (-2 * bound / 32)
    for name, bound in (("beta_fast", 4 + 1e-7), ("beta_slow", 12 - 1e-7))
}
_BIASED = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
# The published name of the count; what published models set otherwise than transformers' defaults; and what their config.json
# says for engines alone.
FAMILIES: dict[str, tuple[str, dict, dict]] = {
    "mixtral": ("num_local_experts", {}, {}),
    "qwen3_moe": ("num_experts", {"norm_topk_prob": True}, {"head_dim": 32}),
    "qwen2_moe": ("num_experts", {}, {}),
    "olmoe": ("num_experts", {}, {}),
    "deepseek_v2": ("n_routed_experts", rope(original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707,
                                             **_YARN | {"factor": 40.0, "truncate": True}),
                    _BIASED | {"scoring_func": "softmax", "topk_method": "greedy"}),
    "deepseek_v3": ("n_routed_experts", {}, _BIASED),
    "glm4_moe": ("n_routed_experts", rope(partial_rotary_factor=0.5), {"head_dim": 32, "rope_scaling": None}),
    "gpt_oss": ("num_local_experts", rope(original_max_position_embeddings=4096, **_YARN), {}),
    "gpt_oss_mxfp4": ("num_local_experts", rope(original_max_position_embeddings=4096, **_YARN | _WHOLE), {}),
    "granitemoe": ("num_local_experts", {"attention_multiplier": 0.2, "embedding_multiplier": 12.0, "logits_scaling": 6.0,
                                         "residual_multiplier": 0.22}, {}),
    "phimoe": ("num_local_experts", {"attention_bias": True, "lm_head_bias": True},
               {"architectures": ["PhiMoEForCausalLM"], "original_max_position_embeddings": 256}),
    "ernie4_5_moe": ("moe_num_experts", {"intermediate_size": 256}, {}),  # a multiple of the shared experts' size
    "minimax_m2": ("num_local_experts", rope(partial_rotary_factor=0.5),
                   {"rotary_dim": 16, "scoring_func": "sigmoid", "shared_intermediate_size": 0, "use_qk_norm": True,
                    "use_routing_bias": True}),
    "hunyuan_v1_moe": ("num_experts", {}, {}),
    "dots1": ("n_routed_experts", {}, {}),
    "lfm2_moe": ("num_experts", {}, {}),
    "jamba": ("num_experts", {}, {}),
    "nemotron_h": ("n_routed_experts", {"initializer_range": 0.1}, {}),
    "qwen3_next": ("num_experts", {"num_hidden_layers": 4} | rope(partial_rotary_factor=0.25), {"full_attention_interval": 4}),
    "afmoe": ("num_experts", {"num_hidden_layers": 4}, {}),  # every fourth attends to all tokens
    "exaone_moe": ("num_experts", {}, {"is_moe_layer": [False, True, True], "head_dim": 32}),
}  # fmt: skip


def full_model(family: str):
    """A model whose config has no name of another family, and whose end token is never the likeliest: all engines run on."""
    kind = family.removesuffix(PACKED)
    known, own = AutoConfig.for_model(kind), OWN.get(kind, {}) | FAMILIES[family][1]
    shape = {name: value for name, value in {**generic(EXPERTS, 2), **SHAPE}.items() if hasattr(known, name)} | own
    if hasattr(known, "qk_rope_head_dim"):
        del shape["head_dim"]  # transformers takes it for the size of the rope
    torch.manual_seed(0)
    model = drawn(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)).eval())
    model.get_output_embeddings().weight.data[1] = 0
    return model


def publish(path: Path, family: str) -> None:
    """Rewrite a config.json as those of the hub are: the published name of the count, and the rope outside."""
    count, _, more = FAMILIES[family]
    config = {name: value for name, value in read_json(path, "config").items() if name not in COUNT_NAMES}
    inner = config.pop("rope_parameters", None) or {}
    outer = {name: inner.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in inner}
    scaled = {"rope_scaling": inner} if inner.get("rope_type", "default") != "default" else {}
    if "qk_rope_head_dim" in config:
        del config["head_dim"]
    write_json(path, {**config, **outer, **scaled, **more, count: EXPERTS})


def pack(folder: Path) -> None:
    """Give every expert of a gpt-oss other weights, in MXFP4: blocks of 32 values of 4 bits, with one exponent each. All other
    weights get values that bfloat16 holds, as the published ones do: optimum-intel reads every MXFP4 folder in bfloat16."""
    path, generator = folder / "model.safetensors", torch.Generator().manual_seed(0)
    state = {name: tensor.bfloat16().float() for name, tensor in load_file(path).items()}
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        n, inner, outer = state.pop(name).shape
        state[f"{name}_blocks"] = torch.randint(256, (n, outer, inner // 32, 16), generator=generator, dtype=torch.uint8)
        state[f"{name}_scales"] = torch.randint(121, 125, (n, outer, inner // 32), generator=generator, dtype=torch.uint8)
    save_file(state, path, metadata={"format": "pt"})
    stays = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    told = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": stays}}
    write_json(folder / "config.json", read_json(folder / "config.json", "config") | told)


def write_folders(family: str, place: Path, tokenizer) -> None:
    """The folders of a family: full, pruned from disk, pruned in memory, and two of `SKIPPING`."""
    model = full_model(family)
    model.save_pretrained(place / "full")
    tokenizer.save_pretrained(place / "full")
    publish(place / "full" / "config.json", family)
    if family.endswith(PACKED):
        pack(place / "full")
        model = stock(place / "full")
    plan = esparse.search_experts(esparse.trace(model, prompts()), KEPT)
    esparse.prune_checkpoint(place / "full", place / "disk", plan)
    if family.endswith(PACKED):  # saved from memory it is no longer quantised
        return
    esparse.save_model(esparse.prune(model, plan), tokenizer, place / "memory", plan)
    betas = esparse.median_betas(esparse.trace(model, prompts()))
    for way, share in SKIPPING.items():
        esparse.enable_skipping(model, [beta * share for beta in betas])
        esparse.save_model(model, tokenizer, place / way)


def prompts() -> torch.Tensor:
    """Token ids [5, 12]."""
    return torch.randint(3, SHAPE["vocab_size"], (5, 12), generator=torch.Generator().manual_seed(1))


def stock(folder: Path):
    """A folder's model in float32, MXFP4 decoded."""
    packed = "quantization_config" in read_json(folder / "config.json", "config")
    decoded = {"quantization_config": Mxfp4Config(dequantize=True)} if packed else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **decoded).eval()
    model.set_experts_implementation("eager")
    return model


def reference(folder: Path, way: str) -> dict[str, list]:
    """What a folder's model generates: in stock transformers, or in esparse where it skips. Then also the share of pairs that
    each layer drops."""
    if way != "skipping":
        return generated(stock(folder))
    model, _ = esparse.load_model(str(folder), dtype=torch.float32)
    found = generated(model)
    ids = torch.cat([prompts(), torch.tensor(found["tokens"])], 1)
    return found | {"dropped": skipped_shares(model, ids[:, :-1])}


@torch.no_grad()
def generated(model) -> dict[str, list]:
    """Greedy tokens, without a cache, their log-probabilities, and how far the second best is behind, each [prompts, NEW]."""
    ids, best = prompts(), []
    for _ in range(NEW):
        best.append(model(ids, use_cache=False).logits[:, -1].log_softmax(-1).topk(2))
        ids = torch.cat([ids, best[-1].indices[:, :1]], 1)
    values = torch.stack([found.values for found in best], 1)
    gaps = values[..., 0] - values[..., 1]
    return {"tokens": ids[:, -NEW:].tolist(), "logprobs": values[..., 0].tolist(), "gaps": gaps.tolist()}


def cell(expected: dict, found: dict) -> dict:
    """How many tokens are equal before the first other one of each prompt, and how far their log-probabilities are apart; or
    what the engine refused with."""
    if "refused" in found:
        return found
    equal, apart, passed = 0, 0.0, True
    for number in range(len(expected["tokens"])):
        want, got = expected["tokens"][number], found["tokens"][number]
        same = next((at for at, (one, other) in enumerate(zip(want, got, strict=False)) if one != other), min(NEW, len(got)))
        pairs = zip(expected["logprobs"][number][:same], found["logprobs"][number][:same], strict=True)
        equal, apart = equal + same, max(apart, *(abs(one - other) for one, other in pairs), 0.0)
        passed &= same == NEW or (same < len(got) and expected["gaps"][number][same] < BOUND)
    passed &= found.get("dropped", []) == pytest.approx(expected.get("dropped", []), abs=1e-9)
    built = {"int4": found["int4"]} if "int4" in found else {}
    return {"passed": passed and apart < BOUND, "equal": equal, "apart": float(f"{apart:.1e}"), **built}


def ask(engine: str, folders: list[Path], place: Path) -> dict:
    """The engine's answers by folder, and its version. It is started again after a folder that ended its process."""
    asked, answered, found = place / "prompts.json", place / "answer.json", {}
    write_json(asked, prompts().tolist())
    python = checkout() / ".venv-engines" / engine / "bin" / "python"
    script = checkout() / "esparse" / "tests" / "engine.py"
    while waiting := [str(folder) for folder in folders if str(folder) not in found]:
        with (place / f"{engine}.log").open("a") as log:
            status = subprocess.run([python, script, engine, asked, answered, *waiting], stdout=log, stderr=log).returncode
        if status > 0:  # not ended by a signal
            raise RuntimeError(f"{engine} does not start: {(place / f'{engine}.log').read_text()[-2000:]}")
        found |= read_json(answered, "answer")
    return found


def rows(engines: list[str], families: list[str], place: Path):
    """One row for each family and engine."""
    tokenizer, expected = load_tokenizer(str(data_folder() / "tiny")), {}
    for family in families:
        write_folders(family, place / family, tokenizer)
        own = ("full", "disk", *(["skipping"] if "vllm-cpu" in engines else []))
        expected |= {(family, way): reference(path, way) for way in own if (path := place / family / way).exists()}
        expected[family, "memory"] = expected[family, "zero"] = expected[family, "disk"]  # the same plan
    for engine in engines:
        asked = [family for family in families if (engine, family) not in LEFT_OUT]
        known = (*WAYS, *SKIPPING) if engine == "vllm-cpu" else WAYS
        ways = {family: [way for way in known if (place / family / way).exists()] for family in asked}
        found = ask(engine, [place / family / way for family in asked for way in ways[family]], place)
        for family in asked:
            cells = {way: cell(expected[family, way], found[str(place / family / way)]) for way in ways[family]}
            yield {"family": family, "engine": engine, "version": found["version"], "date": str(datetime.date.today()), **cells}


def update(found: list[dict]) -> None:
    """Put the rows in place of older ones of the same engine and family."""
    path = data_folder() / "results" / "engines.json"
    before = read_json(path, "table of engines")["rows"] if path.exists() else []
    new = {(row["engine"], row["family"]): row for row in [*before, *found]}
    order = lambda row: (list(ENGINES).index(row["engine"]), list(FAMILIES).index(row["family"]))  # noqa: E731
    write_json(path, {**versions(), "tokens": 5 * NEW, "bound": BOUND, "rows": sorted(new.values(), key=order)})


def table(rows: list[dict]) -> str:
    """The page's table of families and engines: "equal" where all folders pass; "refused" and "other" where the full one
    is refused or runs as another model; "full" where it passes and a pruned one does not."""

    def word(row: dict | None) -> str:
        if row is None:
            return ""
        if not row["full"].get("passed"):
            return "refused" if "refused" in row["full"] else "other"
        return "equal" if all(row[way].get("passed") for way in WAYS if way in row) else "full"

    found = {(row["family"], row["engine"]): row for row in rows}
    engines = {row["engine"]: row["version"] for row in rows}
    lines = [["family", *map(" ".join, engines.items())], ["---"] * (1 + len(engines))]
    lines += [[f"`{family}`", *(word(found.get((family, engine))) for engine in engines)] for family in FAMILIES]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("engines", nargs="+", choices=ENGINES)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--update", action="store_true", help="write the rows into data/results/engines.json")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    found = []
    with tempfile.TemporaryDirectory() as place:
        for row in rows(arguments.engines, arguments.families, Path(place)):
            print(json.dumps(row), flush=True)
            found.append(row)
    if arguments.update:
        update(found)
    print(table(found))
    cells = [{way: row[way].get("passed", False) for way in (*WAYS, *SKIPPING) if way in row} for row in found]
    return int(any(passed["full"] and not all(passed.values()) for passed in cells))


if __name__ == "__main__":
    sys.exit(main())
