#!/usr/bin/env bash
# Guessed: gpt-oss's published rope_scaling says "truncate": false. That entry is
# part of the model, so an engine that has a module for gpt-oss reads it.
#
# The case (mlx-lm 0.32.2, mlx 0.32.4, transformers 5.23.0, 2026-11-29): mlx-lm
# rounds YaRN's two bounds whatever the entry says. With the published values
# (theta 150000, heads of 64, factor 32, 4096 positions) the bounds 8.09 and 17.40
# become 8 and 18, and 9 of the 32 wavelengths are others than in transformers,
# by up to 43%. With "truncate": true all 32 agree.
#
# Output seen:
#   truncate false: 9 of 32 wavelengths differ, by up to 43%
#   truncate true: 0 of 32 wavelengths differ, by up to 0%
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 transformers==5.23.0 "mlx[cpu]==0.32.4" mlx-lm==0.32.2
export HF_HUB_OFFLINE=1 HF_HOME="$folder/hub" TRANSFORMERS_VERBOSITY=error
venv/bin/python - <<'PYTHON'
import torch
from mlx_lm.models import gpt_oss
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

shape = {
    "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 64,
    "num_attention_heads": 1, "num_key_value_heads": 1, "num_local_experts": 4,
    "num_experts_per_tok": 2, "vocab_size": 64,
    "layer_types": ["sliding_attention", "full_attention"],
}
yarn = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
}
found = []
for truncate in (False, True):
    scaling = yarn | {"truncate": truncate}
    config = GptOssConfig(**shape, rope_parameters={"rope_theta": 150000.0, **scaling})
    stock = 1 / GptOssRotaryEmbedding(config).inv_freq.double()
    args = gpt_oss.ModelArgs(**shape, rope_theta=150000, rope_scaling=scaling)
    rope = gpt_oss.Model(args).model.layers[0].self_attn.rope
    apart = (torch.tensor(rope._freqs.tolist(), dtype=torch.float64) / stock - 1).abs()
    found.append(((apart > 1e-4).sum().item(), f"{apart.max():.0%}"))
    count, most = found[-1]
    print(f"truncate {str(truncate).lower()}: {count} of {len(apart)} wavelengths differ, by up to {most}")
assert found == [(9, "43%"), (0, "0%")], "mlx-lm has changed"
PYTHON
