#!/usr/bin/env bash
# Guessed: save_pretrained(save_original_format=True) writes a Mixtral with one
# set of tensors per expert, the names of the published checkpoints, wherever
# the model came from; its description says that the way back must exist even
# for a model not read from an old checkpoint.
#
# The case (transformers 5.23.0, safetensors 0.8.0, torch 2.13.0, 2026-11-28):
# the names depend on the folder the model was read from. from_pretrained keeps
# only the conversions that it used and save_pretrained undoes only those. Read
# from a folder of stacked experts none was used, so stacks are written again.
# A model built from a config, or read from per-expert names, gives per-expert
# names; to get them back, copy the weights into a model built from the config.
#
# Output seen (tensors of experts that each save wrote, layer 0):
#   built from a config: 12 per expert, 0 stacked
#   read from per-expert names: 12 per expert, 0 stacked
#   read from stacks: 0 per expert, 2 stacked
#   read from stacks, copied into a built one: 12 per expert, 0 stacked
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 transformers==5.23.0 safetensors==0.8.0
export HF_HUB_OFFLINE=1 HF_HOME="$folder/hub" TRANSFORMERS_VERBOSITY=error
venv/bin/python - <<'PYTHON'
import torch
from safetensors import safe_open
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
torch.manual_seed(0)
config = MixtralConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    num_experts_per_tok=2, max_position_embeddings=64,
)
built = MixtralForCausalLM(config)
weights = built.state_dict()


def check(case, model, folder, per_expert, stacked):
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), (case, name)
    model.save_pretrained(folder, save_original_format=True)
    with safe_open(f"{folder}/model.safetensors", "pt") as file:
        names = [name for name in file.keys() if ".layers.0." in name and ".experts." in name]
    stacks = [name for name in names if name.endswith(("gate_up_proj", "down_proj"))]
    singles = [name for name in names if name.endswith((".w1.weight", ".w2.weight", ".w3.weight"))]
    print(f"{case}: {len(singles)} per expert, {len(stacks)} stacked")
    assert len(names) == len(singles) + len(stacks), names
    assert (len(singles), len(stacks)) == (per_expert, stacked), names


check("built from a config", built, "built", 12, 0)
check("read from per-expert names", MixtralForCausalLM.from_pretrained("built"), "again", 12, 0)
built.save_pretrained("stacks", save_original_format=False)
read = MixtralForCausalLM.from_pretrained("stacks")
check("read from stacks", read, "stacks-again", 0, 2)
copied = MixtralForCausalLM(config)
copied.load_state_dict(read.state_dict())
check("read from stacks, copied into a built one", copied, "copied", 12, 0)
PYTHON
