"""Serving engines on full and pruned folders, against stock transformers in float32. `.ci/engines` runs it:

    python -m esparse.tests.with_engines [--families NAME...] [--update] ENGINE...

Every family's small model with random weights is written as a full folder with a published config, pruned from disk, and
pruned in memory and saved. Each engine generates 64 tokens greedily after each of 5 prompts. A cell passes where its tokens
are those of transformers, and their log-probabilities too. Exits with 1 where a full model passes and a pruned one does not.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

import esparse
from esparse.checkpoints.models import load_tokenizer
from esparse.files import checkout, data_folder, read_json, versions, write_json
from esparse.moe.layers import COUNT_NAMES
from esparse.tests.engine import ENGINES, NEW
from esparse.tests.families import OWN, drawn, generic

BOUND = 1e-3  # on log-probabilities. Where the likeliest two tokens are nearer to each other than that, either will do.
EXPERTS, KEPT, WAYS = 8, 6, ("full", "disk", "memory")
SKIPPED = {("llama.cpp", "dots1")}  # the engine's process ends
ROPE = {"rope_type": "default", "rope_theta": 5e4}  # no engine's default, so that one that overlooks it is caught
SHAPE = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "num_attention_heads": 2,
         "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "initializer_range": 0.2, "use_cache": True,
         "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32,
         "rope_parameters": ROPE}  # fmt: skip


def rope(**changes) -> dict:
    return {"rope_parameters": ROPE | changes}


_YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
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
    known, own = AutoConfig.for_model(family), OWN.get(family, {}) | FAMILIES[family][1]
    shape = {name: value for name, value in {**generic(EXPERTS, 2), **SHAPE}.items() if hasattr(known, name)} | own
    if hasattr(known, "qk_rope_head_dim"):
        del shape["head_dim"]  # transformers takes it for the size of the rope
    torch.manual_seed(0)
    model = drawn(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)).eval())
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


def write_folders(family: str, place: Path, tokenizer) -> None:
    """The three folders of a family: full, pruned from disk, pruned in memory."""
    model = full_model(family)
    model.save_pretrained(place / "full")
    tokenizer.save_pretrained(place / "full")
    publish(place / "full" / "config.json", family)
    plan = esparse.search_experts(esparse.trace(model, prompts()), KEPT)
    esparse.prune_checkpoint(place / "full", place / "disk", plan)
    esparse.save_model(esparse.prune(model, plan), tokenizer, place / "memory", plan)


def prompts() -> torch.Tensor:
    """Token ids [5, 12]."""
    return torch.randint(3, SHAPE["vocab_size"], (5, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def reference(folder: Path) -> dict[str, list]:
    """Stock transformers without a cache: the greedy tokens, their log-probabilities, and how far the second best is behind,
    each [prompts, NEW]."""
    model, ids, best = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), prompts(), []
    model.set_experts_implementation("eager")
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
    return {"passed": passed and apart < BOUND, "equal": equal, "apart": float(f"{apart:.1e}")}


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
        expected |= {(family, way): reference(place / family / way) for way in WAYS[:2]}
        expected[family, "memory"] = expected[family, "disk"]  # the same plan
    for engine in engines:
        asked = [family for family in families if (engine, family) not in SKIPPED]
        found = ask(engine, [place / family / way for family in asked for way in WAYS], place)
        for family in asked:
            cells = {way: cell(expected[family, way], found[str(place / family / way)]) for way in WAYS}
            yield {"family": family, "engine": engine, "version": found["version"], "date": str(datetime.date.today()), **cells}


def update(found: list[dict]) -> None:
    """Put the rows in place of older ones of the same engine and family."""
    path = data_folder() / "results" / "engines.json"
    before = read_json(path, "table of engines")["rows"] if path.exists() else []
    new = {(row["engine"], row["family"]): row for row in [*before, *found]}
    order = lambda row: (list(ENGINES).index(row["engine"]), list(FAMILIES).index(row["family"]))  # noqa: E731
    write_json(path, {**versions(), "tokens": 5 * NEW, "bound": BOUND, "rows": sorted(new.values(), key=order)})


def table(rows: list[dict]) -> str:
    """The page's table of families and engines: "equal" where all three folders pass; "refused" and "other" where the full one
    is refused or runs as another model; "full" where it passes and a pruned one does not."""

    def word(row: dict | None) -> str:
        if row is None:
            return ""
        passed = [way for way in WAYS if row[way].get("passed")]
        return (
            "equal" if passed == [*WAYS] else "full" if "full" in passed else "refused" if "refused" in row["full"] else "other"
        )

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
    passed = lambda row, way: row[way].get("passed", False)  # noqa: E731
    return int(any(passed(row, "full") and not (passed(row, "disk") and passed(row, "memory")) for row in found))


if __name__ == "__main__":
    sys.exit(main())
