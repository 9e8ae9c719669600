"""config.json says what the published one says, whatever wrote the folder, and stock transformers reads the same model."""

import json

import pytest
import torch
import transformers

import esparse
from esparse.checkpoints.models import save_model
from esparse.files import data_folder
from esparse.moe.layers import moe_layers
from esparse.moe.published import published
from esparse.tests.checkpoints.test_layouts import TOKENS, run
from esparse.tests.conftest import sampled
from esparse.tests.families import CARRIED, FAMILIES, SAMPLE, family_model

# From the hub's config.json of each family: the count's name, and what engines read and transformers 5 does not write.
BIASED = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
HUB = {
    "mixtral": ("num_local_experts", {"rope_theta": 1e6}),
    "qwen2_moe": ("num_experts", {"rope_theta": 1e4}),
    "qwen3_moe": ("num_experts", {"rope_theta": 1e4, "head_dim": 8}),
    "qwen3_next": ("num_experts", {"rope_theta": 1e4, "partial_rotary_factor": 0.25, "full_attention_interval": 4}),
    "olmoe": ("num_experts", {"rope_theta": 1e4}),
    "deepseek_v2": ("n_routed_experts", {"scoring_func": "softmax", "topk_method": "greedy", "moe_layer_freq": 1}),
    "deepseek_v3": ("n_routed_experts", BIASED | {"rope_theta": 1e4}),
    "glm4_moe": ("n_routed_experts", {"rope_scaling": None, "partial_rotary_factor": 0.5, "head_dim": 8}),
    "glm_moe_dsa": ("n_routed_experts", BIASED | {"rope_theta": 1e4}),
    "granitemoe": ("num_local_experts", {"rope_theta": 1e4}),
    "minimax_m2": ("num_local_experts", {"rotary_dim": 8, "scoring_func": "sigmoid", "use_qk_norm": True}),
}
OTHERS = {"num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"}  # the tests' configs have all of them


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("family", HUB)
def test_a_model_without_a_source_has_the_published_entries(family, tmp_path, tiny):
    name, entries = HUB[family]
    model = family_model(family)
    save_model(model, tiny[1], tmp_path / "saved")
    saved = config_of(tmp_path / "saved")
    assert saved[name] == 8 and saved.items() >= entries.items()
    if family == "qwen3_moe":  # under its other name too the count would have to be changed twice
        assert "num_local_experts" not in saved
    if family in ("deepseek_v2", "deepseek_v3"):  # engines take it for the size of the values too
        assert "head_dim" not in saved
    assert saved.get("scoring_func") in (None, moe_layers(model)[0].router.score)  # found from what the router computes


@pytest.mark.parametrize("family", sampled([name for name in FAMILIES if name not in CARRIED], SAMPLE.keys() - CARRIED.keys()))
def test_stock_transformers_reads_the_same_model(family, tmp_path, tiny):
    model = family_model(family, k=1 if family == "zaya" else 2)
    expected = run(model)
    save_model(model, tiny[1], tmp_path / "once")
    again, found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "once", output_loading_info=True)
    assert not any(found.values()) and (run(again) - expected).abs().max() == 0
    save_model(again, tiny[1], tmp_path / "twice")
    assert config_of(tmp_path / "twice") == config_of(tmp_path / "once")
    esparse.prune_checkpoint(tmp_path / "once", tmp_path / "disk", 8, calibration=TOKENS, method="reap")
    assert config_of(tmp_path / "disk") == config_of(tmp_path / "once")


PLAIN = {"dtype", "num_local_experts", "rope_parameters", "transformers_version"}  # what transformers 5 writes otherwise


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
    ],
)  # fmt: skip
def test_the_source_s_own_config_stays(scaling, tmp_path, tiny):
    """Entries of a published folder from before transformers 5, one that nobody knows among them."""
    source, tokenizer = tmp_path / "source", tiny[1]
    family_model("qwen3_moe").bfloat16().save_pretrained(source)
    tokenizer.save_pretrained(source)
    own = {"num_experts": 8, "torch_dtype": "bfloat16", "rope_theta": 5e5, "rope_scaling": scaling, "of_the_lab": [1, {"a": 2}]}
    written = {name: value for name, value in config_of(source).items() if name not in PLAIN}
    (source / "config.json").write_text(json.dumps(written | own | {"transformers_version": "4.51.0", "head_dim": 8}))
    said, stock = config_of(source), transformers.AutoModelForCausalLM.from_pretrained(source)
    assert stock.config.rope_parameters["rope_theta"] == 5e5
    model, _ = esparse.load_model(str(source))
    plan = esparse.search_experts(esparse.trace(model, TOKENS), 6)
    save_model(esparse.prune(model, plan), tokenizer, tmp_path / "memory", plan)
    esparse.prune_checkpoint(source, tmp_path / "disk", plan)
    expected = {name: 6 if name in OTHERS else value for name, value in said.items()}
    assert config_of(tmp_path / "memory") == config_of(tmp_path / "disk") == expected
    for name in ("memory", "disk"):
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert again.config.rope_parameters == stock.config.rope_parameters and torch.equal(run(again), run(model))
    save_model(esparse.load_model(str(source), dtype="float32")[0], tokenizer, tmp_path / "wide")
    assert config_of(tmp_path / "wide") == said | {"torch_dtype": "float32"}


def test_a_changed_entry_is_written(tmp_path, tiny):
    source = tmp_path / "source"
    family_model("mixtral").save_pretrained(source)
    entries = config_of(source) | {"rope_theta": 1e6, "rope_scaling": None}
    (source / "config.json").write_text(json.dumps(entries))
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    model.config.router_aux_loss_coef = 0.5
    model.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 2e4}
    save_model(model, tiny[1], tmp_path / "saved")
    saved, again = config_of(tmp_path / "saved"), transformers.AutoConfig.from_pretrained(tmp_path / "saved")
    assert (saved["router_aux_loss_coef"], saved["rope_theta"]) == (0.5, 2e4)
    assert saved["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert again.rope_parameters == model.config.rope_parameters
    assert not any(str(tmp_path) in str(value) for value in saved.values())


@pytest.mark.parametrize("name", ["tiny", "tiny-scratch"])
def test_the_shipped_models_say_their_theta(name):
    config = config_of(data_folder() / name)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e4


def test_what_follows_from_nothing_is_left_out():
    assert published({"is_moe_layer": [True]}, "exaone_moe") == {"is_moe_layer": [True]}
    assert published({"num_experts": 4, "full_attention_interval": 2}, "qwen3_next")["full_attention_interval"] == 2
    assert published({}, "qwen3_next") == published({}, "qwen3_moe") == {}
