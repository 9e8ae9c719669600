"""Tiny models of every MoE family that uses transformers' experts interface, from one generic config."""

import copy
from dataclasses import replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from esparse.checkpoints.layout import stock_class
from esparse.moe.gates import per_expert, table
from esparse.moe.layers import COUNT_NAMES, moe_layers


def generic(n: int, k: int) -> dict:
    """One tiny shape under all the names that families have for it."""
    counts = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), n)
    routed = dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), k)
    inner = dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 24)
    inner |= dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_intermediate_size"), 24)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16}
    heads |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    shared = {"n_shared_experts": 1, "num_shared_experts": 1, "first_k_dense_replace": 1, "num_dense_layers": 1}
    tokens = {"vocab_size": 60, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "max_position_embeddings": 128}
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "use_cache": False, "n_group": 1, "topk_group": 1}
    return counts | routed | inner | heads | shared | tokens | shape


# Every model type that works, with a published checkpoint of it; the table in FAMILIES.md is checked against this.
FAMILIES = {
    "mixtral": "mistralai/Mixtral-8x7B-v0.1",
    "qwen2_moe": "Qwen/Qwen1.5-MoE-A2.7B",
    "qwen3_moe": "Qwen/Qwen3-30B-A3B-Base",
    "qwen3_next": "Qwen/Qwen3-Next-80B-A3B-Instruct",
    "qwen3_5_moe_text": "Qwen/Qwen3.5-35B-A3B",
    "qwen4_exp_text": "Qwen/Qwen4-Exp",
    "olmoe": "allenai/OLMoE-1B-7B-0924",
    "flex_olmo": "allenai/FlexOlmo-7x7B-1T",
    "deepseek_v2": "deepseek-ai/DeepSeek-V2-Lite",
    "deepseek_v3": "deepseek-ai/DeepSeek-V3",
    "deepseek_v32": "deepseek-ai/DeepSeek-V3.2-Exp",
    "glm4_moe": "zai-org/GLM-4.5",
    "glm4_moe_lite": "zai-org/GLM-4.7-Flash",
    "glm_moe_dsa": "zai-org/GLM-5",
    "gpt_oss": "openai/gpt-oss-20b",
    "granitemoe": "ibm-granite/granite-3.0-1b-a400m-base",
    "granitemoeshared": "ibm-research/moe-7b-1b-active-shared-experts",
    "granitemoehybrid": "ibm-granite/granite-4.0-h-tiny",
    "granitemoe_swa": "ibm-granite/granite-swash-3b-a600m",
    "phimoe": "microsoft/Phi-3.5-MoE-instruct",
    "ernie4_5_moe": "baidu/ERNIE-4.5-21B-A3B-PT",
    "minimax": "MiniMaxAI/MiniMax-Text-01-hf",
    "minimax_m2": "MiniMaxAI/MiniMax-M2",
    "minimax_m3_vl_text": "MiniMaxAI/MiniMax-M3",
    "hunyuan_v1_moe": "tencent/Hunyuan-A13B-Instruct",
    "hy_v3": "tencent/Hy3-preview",
    "hy_v4": "tencent/Hy4-preview",
    "jamba": "ai21labs/Jamba-v0.1",
    "nemotron_h": "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "kimi_linear": "moonshotai/Kimi-Linear-48B-A3B-Instruct",
    "bailing_hybrid": "inclusionAI/Ling-3.0-Flash",
    "lfm2_moe": "LiquidAI/LFM2-8B-A1B",
    "gemma4_text": "google/gemma-4-26B-A4B",
    "afmoe": "arcee-ai/Trinity-Mini",
    "aria_text": "rhymes-ai/Aria",
    "axk1": "skt/A.X-K1",
    "axk2": "skt/A.X-K2",
    "beam": "reflection/Beam-1.0-501B-A23B",
    "cohere2_moe": "CohereLabs/command-a-plus-05-2026",
    "dots1": "rednote-hilab/dots.llm1.base",
    "exaone_moe": "LGAI-EXAONE/K-EXAONE-236B-A23B",
    "flint": "RecursiveSI/flint",
    "inkling2_text": "thinkingmachines/Inkling-2-Small-MXFP8",
    "kolibri1": "Aleph-Alpha/Kolibri-1",
    "laguna": "poolside/laguna-XS.2",
    "mellum": "JetBrains/Mellum2-12B-A2.5B-Base",
    "mimo_v2_flash": "XiaomiMiMo/MiMo-V2-Flash",
    "solar_open": "upstage/Solar-Open-100B",
    "deepseek_v4": "deepseek-ai/DeepSeek-V4-Flash",
    "inkling_text": "thinkingmachines/Inkling",
    "zaya": "Zyphra/ZAYA1-8B",
    "dots3_note_text": "dots-studio/dots3-note-prev",
    "lara_mini": "translated/Lara-4-Mini-Base",
    "sarvam_moe": "sarvamai/sarvam-30b",
    "sarvam_mla": "sarvamai/sarvam-105b",
    "inkling2_loop_text": "thinkingmachines/Inkling-2-Mini",
}
# One family of every kind of router and of every layout, with the kind. `test_the_sample_has_every_kind_of_router` checks
# the first; tests of every family run on the others with --exhaustive.
SAMPLE = {
    "mixtral": "softmax, weights made to sum to 1",
    "qwen2_moe": "softmax as it is; a shared expert with a gate of its own",
    "deepseek_v3": "sigmoid with a bias for the choice and a scale; dense layers before the MoE layers",
    "minimax_m2": "the same without the scale; the bias lies on the block",
    "gpt_oss": "softmax of the chosen; transposed experts with biases, gate and up interleaved",
    "granitemoe": "softmax of the chosen; experts stacked in the published folder too",
    "phimoe": "SparseMixer, in the dtype of the logits",
    "ernie4_5_moe": "softmax with a bias for the choice, which does not keep the ranking",
    "minimax_m3_vl_text": "a factor on what leaves the experts",
    "nemotron_h": "a projection behind experts without gates; Mamba layers between",
    "lfm2_moe": "a term in the sum that weights are divided by; convolutions between",
    "gemma4_text": "probabilities given by the router, a scale for each expert, a norm behind the experts",
    "axk1": "sigmoid, a norm behind the experts",
    "cohere2_moe": "softmax of the chosen, with a factor behind the experts",
    "dots1": "sigmoid as it is, with a bias for the choice",
    "flint": "sigmoid without a bias",
    "kolibri1": "a choice by logits and weights by sigmoid",
    "deepseek_v4": "a table by token ids in some layers, sqrtsoftplus in others",
    "inkling_text": "shared experts among the router's rows",
    "zaya": "one expert a token, or none",
    "inkling2_text": "hidden states of earlier layers: not to be walked layer by layer",
}
# What older versions of transformers, from 5.17 on, keep elsewhere than behind the experts interface, or do not know: the
# version that will do.
NEWER = dict.fromkeys(("granitemoe", "granitemoeshared", "granitemoehybrid", "jamba", "aria_text", "bailing_hybrid"), "5.23")
NEWER |= dict.fromkeys(("beam", "flint", "inkling2_text", "kolibri1", "dots3_note_text"), "5.23")
NEWER |= dict.fromkeys(("lara_mini", "sarvam_moe", "sarvam_mla", "inkling2_loop_text"), "5.24")
BESIDE = {"inkling_text": 1, "zaya": 1}  # router rows that are no expert's
# What cannot be walked layer by layer, and the words that say why.
CARRIED = dict.fromkeys(("inkling2_text", "inkling2_loop_text"), "also takes hidden states of earlier layers")

# What the generic names leave too large, or what a family asks for by a rule of its own.
OWN = {
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe", "hash_moe"], "layer_types": ["sliding_attention"] * 3,
                    "num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 8, "index_n_heads": 2, "index_head_dim": 8},
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "gemma4_text": {"enable_moe_block": True, "vocab_size_per_layer_input": 60, "hidden_size_per_layer_input": 8},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
                         "layer_types": ["mamba", "attention", "mamba"]},
    "inkling2_text": {"unpadded_vocab_size": 60, "n_layers_per_attn_res_block": 1},  # the first is of 5.24 on
    "inkling2_loop_text": {"unpadded_vocab_size": 60, "n_layers_per_attn_res_block": 1, "loop_num_passes": 2,
                           "loop_layer_index_start": 1, "loop_layer_index_end": 3},  # its last two layers run twice
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"linear_num_heads": 4, "linear_head_dim": 8},
    "lfm2_moe": {"layer_types": ["full_attention", "conv", "full_attention"]},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "nemotron_h": {"moe_latent_size": 16, "layers_block_type": ["mamba", "moe", "attention", "moe"], "mamba_num_heads": 4,
                   "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1},
    "zaya": {"num_experts_per_tok": 1, "layer_types": None, "router_hidden_size": 16, "initializer_range": 0.4},
}  # fmt: skip


# Composite model types whose checkpoints hold one of these text models beside other towers: a published checkpoint, the text
# model's type, and what the generic names leave open.
_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
COMPOSITES = {
    "qwen3_5_moe": ("Qwen/Qwen3.5-35B-A3B", "qwen3_5_moe_text", {}),
    "qwen4_exp": ("Qwen/Qwen4-Exp", "qwen4_exp_text", {}),
    "gemma4": ("google/gemma-4-26B-A4B", "gemma4_text", {}),
    "minimax_m3_vl": ("MiniMaxAI/MiniMax-M3", "minimax_m3_vl_text", {}),
    "aria": ("rhymes-ai/Aria", "aria_text", {}),
    "qwen3_vl_moe": ("Qwen/Qwen3-VL-30B-A3B-Instruct", "qwen3_vl_moe_text", {}),
    "glm4v_moe": ("zai-org/GLM-4.5V", "glm4v_moe_text", {"rope_parameters": _SECTIONS}),
    "glm46v": ("zai-org/GLM-4.6V", "glm4v_moe_text", {"rope_parameters": _SECTIONS}),
    "kimi_k25": ("moonshotai/Kimi-K2.5", "deepseek_v3", {}),
    "mistral3": ("mistralai/Mistral-Small-4-119B-2603", "mistral4", {"head_dim": 16}),
    "cohere2_vision": ("CohereLabs/command-a-plus-05-2026", "cohere2_moe", {}),
    "inkling_mm_model": ("thinkingmachines/Inkling", "inkling_text", {}),
    "internvl": ("OpenGVLab/InternVL3_5-30B-A3B-HF", "qwen3_moe", {}),
    "qianfan_ocr": ("baidu/Qianfan-OCR", "qwen3_moe", {}),
}
_VISION = {"hidden_size": 32, "num_hidden_layers": 1, "depth": 1, "intermediate_size": 24, "num_attention_heads": 4,
           "num_heads": 4, "patch_size": 4, "image_size": 16, "out_hidden_size": 32, "num_position_embeddings": 16}  # fmt: skip


def composite_model(model_type: str, seed: int = 0):
    """A whole composite model, float32, with experts and routing as `family_model` draws them."""
    _, text, own = COMPOSITES[model_type]
    shape = {**generic(8, 2), **OWN.get(text, {}), **own, "model_type": text}
    config = AutoConfig.for_model(model_type, text_config=shape, vision_config=_VISION)
    torch.manual_seed(seed)
    return drawn(stock_class(config)(config).eval())


def family_config(model_type: str, n: int = 8, k: int = 2, **changes):
    return AutoConfig.for_model(model_type, **{**generic(n, k), **OWN.get(model_type, {}), **changes})


def family_model(model_type: str, n: int = 8, k: int = 2, seed: int = 0, **changes):
    """A float32 model whose experts, routing and selection biases differ enough for subsets to matter."""
    torch.manual_seed(seed)
    return drawn(AutoModelForCausalLM.from_config(family_config(model_type, n, k, **changes)).eval())


NUMBERS = ("bias", "expert_scale", "scale", "eps", "jitter")  # of a router, which only matter as there or not there


def router_kinds(model) -> set[str]:
    """What tells the routers of a model's MoE layers apart, numbers aside, and how their experts' sum leaves the block."""
    present = lambda router: {name: getattr(router, name) not in (None, 0.0, 1.0) for name in NUMBERS}  # noqa: E731
    described = [(replace(layer.router, dtype="", **present(layer.router)), layer) for layer in moe_layers(model)]
    return {str((router, layer.output_is_linear, layer.output_map is None)) for router, layer in described}


def drawn(model):
    """The model with other experts, routing and selection biases; eager experts."""
    model.set_experts_implementation("eager")
    beside = BESIDE.get(model.config.get_text_config().model_type, 0)
    for layer in moe_layers(model):
        if name := table(layer.gate):  # every token id's k experts are drawn
            ids = getattr(layer.gate, name)  # [vocabulary, k]
            ids.copy_(torch.stack([torch.randperm(layer.n)[: ids.shape[1]] for _ in range(len(ids))]))
        for module, name, _ in per_expert(layer.block, layer.gate, layer.n, beside):
            tensor = getattr(module, name).data
            tensor.normal_(std=0.5) if tensor.ndim == 2 and tensor.numel() > layer.n else tensor.uniform_(0.5, 0.9)
            if tensor.shape == (layer.n + 1,):  # transformers sets the last to -1, whatever it loads
                tensor.sub_(1.7)[-1] = -1.0
        for parameter in layer.experts.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def smaller_row(row: list[int], kept: list[int], n: int) -> list[int]:
    """A token id's experts in a table, by new numbers: those that are kept, then as many of the others as are missing, by
    number from the sum of the row on."""
    others = [e for step in range(n) if (e := (sum(row) + step) % n) in kept and e not in row]
    return [kept.index(e) for e in [*(e for e in row if e in kept), *others][: len(row)]]


def stock_pruned(model, kept: list[int]):
    """A stock model with fewer experts in its config; whatever has another shape there is cut to the kept experts."""
    config, n = copy.deepcopy(model.config), moe_layers(model)[0].n
    for part in (config, config.get_text_config()):
        for name in COUNT_NAMES:
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, len(kept))
    small = AutoModelForCausalLM.from_config(config).eval()
    small.set_experts_implementation("eager")
    weights = {}
    for name, tensor in small.state_dict().items():
        weights[name] = model.state_dict()[name]
        for axis, (there, here) in enumerate(zip(tensor.shape, weights[name].shape, strict=True)):
            if there != here:
                weights[name] = weights[name].index_select(axis, torch.tensor([*kept, *range(len(kept) + here - there, here)]))
        if not tensor.is_floating_point() and tensor.ndim == 2:
            weights[name] = torch.tensor([smaller_row(row, kept, n) for row in weights[name].tolist()])
    small.load_state_dict(weights)
    return small
