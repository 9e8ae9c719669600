#!/usr/bin/env bash
# Guessed: to load a Mixtral from the hub's layout, one tensor for each expert
# and projection, transformers copies every expert weight once, into the stacked
# parameter that its experts have since version 5.
#
# The case (transformers 5.23.0, torch 2.13.0, 2026-11-30): gate and up
# projections are copied twice. The experts of each are stacked, then both stacks
# are joined. So loading allocates five thirds of the experts' bytes for them.
#
# Output seen:
#   bytes of the experts: 786432
#   bytes of stacked and joined tensors while loading: 1310720
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 transformers==5.23.0
export HF_HUB_OFFLINE=1 HF_HOME="$folder/hub" TRANSFORMERS_VERBOSITY=error
export HF_DEACTIVATE_ASYNC_LOAD=1  # in one thread, the one that is watched
venv/bin/python - <<'PYTHON'
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
config = MixtralConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, num_local_experts=8,
)
model = MixtralForCausalLM(config)
model.save_pretrained("made")
experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)


class Copies(TorchDispatchMode):
    total = 0

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        found = operation(*arguments, **(named or {}))
        if operation in (torch.ops.aten.stack.default, torch.ops.aten.cat.default):
            self.total += found.nbytes
        return found


with Copies() as copies:
    MixtralForCausalLM.from_pretrained("made", dtype=torch.float32)
print("bytes of the experts:", experts)
print("bytes of stacked and joined tensors while loading:", copies.total)
assert 3 * copies.total == 5 * experts, "transformers has changed"
PYTHON
