#!/usr/bin/env bash
# Guessed: mlx-lm loads weights strictly, so a tensor of a checkpoint that its
# model has no place for is an error. ERNIE 4.5's router bias, which decides
# which experts a token gets, is therefore either used or refused.
#
# The case (mlx-lm 0.32.2, mlx 0.32.4, transformers 5.23.0, 2026-11-29): neither.
# The bias is taken out of the weights before they are loaded, and the model
# routes without it. Its logits are those of transformers with a bias of zero.
#
# Output seen:
#   largest difference of the logits from transformers with the bias: 4.4
#   largest difference of the logits from transformers with a bias of zero: 0.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 transformers==5.23.0 "mlx[cpu]==0.32.4" mlx-lm==0.32.2
export HF_HUB_OFFLINE=1 HF_HOME="$folder/hub" TRANSFORMERS_VERBOSITY=error
venv/bin/python - <<'PYTHON'
import json
import pathlib

import mlx.core as mx
import torch
from mlx_lm.utils import load_model
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
mx.set_default_device(mx.cpu)
torch.manual_seed(0)
config = Ernie4_5_MoeConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=32,
    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, moe_num_experts=8,
    moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=1, moe_layer_end_index=1,
    max_position_embeddings=64, initializer_range=0.3,
)
model = Ernie4_5_MoeForCausalLM(config).eval()
bias = model.model.layers[1].mlp.gate.moe_statics.e_score_correction_bias
bias.data = torch.randn(bias.shape)
made = pathlib.Path("made")
model.save_pretrained(made)
# mlx-lm reads two entries as the hub's config.json has them.
entries = json.loads((made / "config.json").read_text())
entries |= {"rope_theta": entries["rope_parameters"]["rope_theta"], "moe_num_experts": 8, "head_dim": 16}
(made / "config.json").write_text(json.dumps(entries))

ids = torch.arange(3, 35)[None]
served, _ = load_model(made)
logits = torch.tensor(served(mx.array(ids.tolist())).tolist())
found = []
with torch.no_grad():
    for words in ("the bias", "a bias of zero"):
        apart = (model(ids, use_cache=False).logits - logits).abs().max().item()
        print(f"largest difference of the logits from transformers with {words}: {apart:.1f}")
        found.append(apart)
        bias.zero_()
assert found[0] > 1 > 1e-2 > found[1], "mlx-lm has changed"
PYTHON
