#!/usr/bin/env bash
# Guessed: in a sharded safetensors checkpoint, weight_map decides from which
# file each tensor is read. So one expert can be replaced without rewriting the
# big shard: put its new weight into a small file and point its entry there.
#
# The case (transformers 5.23.0, safetensors 0.8.0, torch 2.13.0, 2026-11-28):
# from_pretrained takes only the list of file names from weight_map, sorts it
# and reads every tensor of every file. Of two copies of a tensor the one in the
# file that sorts last is loaded, whichever of them weight_map names, and the
# loading report says nothing. A tensor without an entry is loaded all the same.
#
# Output seen:
#   old copy in a.safetensors, weight_map names a.safetensors: loaded the new copy
#   old copy in a.safetensors, weight_map names b.safetensors: loaded the new copy
#   old copy in b.safetensors, weight_map names a.safetensors: loaded the old copy
#   old copy in b.safetensors, weight_map names b.safetensors: loaded the old copy
#   no entry for lm_head.weight: loaded all the same
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 transformers==5.23.0 safetensors==0.8.0
export HF_HUB_OFFLINE=1 HF_HOME="$folder/hub" TRANSFORMERS_VERBOSITY=error
venv/bin/python - <<'PYTHON'
import json
import pathlib

import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
torch.manual_seed(0)
config = MixtralConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    num_experts_per_tok=2, max_position_embeddings=64,
)
made = pathlib.Path("made")
MixtralForCausalLM(config).save_pretrained(made)
tensors = load_file(made / "model.safetensors")
# w2 of expert 2 in layer 1; the loaded model holds it in a stack.
name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
old, new = tensors[name], tensors[name] + 1


def load(folder, weight_map):
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model, report = MixtralForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model


def fill(folder, big, small):
    folder.mkdir()
    config.save_pretrained(folder)
    save_file(tensors, folder / big, metadata={"format": "pt"})
    # The small file also holds a tensor of its own: both files are always listed.
    save_file({name: new, "lm_head.weight": tensors["lm_head.weight"]},
              folder / small, metadata={"format": "pt"})


seen = []
for big, small in (("a", "b"), ("b", "a")):
    big, small = big + ".safetensors", small + ".safetensors"
    folder = pathlib.Path(f"old-in-{big}")
    fill(folder, big, small)
    for named in ("a.safetensors", "b.safetensors"):
        # Every entry is true: the file it names holds that tensor.
        weight_map = {key: big for key in tensors}
        weight_map["lm_head.weight"] = small
        weight_map[name] = named
        got = load(folder, weight_map).model.layers[1].mlp.experts.down_proj[2]
        assert torch.equal(got, new) != torch.equal(got, old)
        copy = "new" if torch.equal(got, new) else "old"
        print(f"old copy in {big}, weight_map names {named}: loaded the {copy} copy")
        seen.append(copy)
assert seen == ["new", "new", "old", "old"], seen

del weight_map["lm_head.weight"]
weight_map[name] = small
model = load(folder, weight_map)
assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
print("no entry for lm_head.weight: loaded all the same")
PYTHON
