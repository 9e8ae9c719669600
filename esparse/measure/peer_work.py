"""One piece of work of `peers`, by esparse or by llm-compressor, in a process of its own:

    python -m esparse.measure.peer_work WORK FOLDER

WORK: a key of `WORKS`. FOLDER: a checkpoint with `tokens.safetensors` in it, ids [sequences, length]. Writes WORK.json into the
folder's parent: the processor "seconds" of the work alone, after loading, the process's "peak_mib" of memory, the experts
"kept" in each layer, and the version of transformers. Wanda also writes WORK.safetensors: which entries of each linear map
it keeps, as bits, by llm-compressor's names.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..machine import peak_memory

KEPT = 6
BATCH = 8  # sequences in one forward pass

Result = tuple[list[list[int]] | None, nn.Module | None]  # the experts kept in each layer, or a model with pruned weights


def load(folder: Path) -> nn.Module:
    import esparse

    return esparse.load_model(str(folder), dtype=torch.float32)[0]


def _experts(model, tokens: Tensor, method: str) -> Result:
    import esparse

    n = model.config.num_local_experts
    traced = esparse.trace(model, tokens, keep=KEPT if method == "enumerate" else n, batch_size=BATCH)
    plan = esparse.search_experts(traced, KEPT, method=method, loss="eq3")
    esparse.prune(model, plan)
    return plan.kept, None


def _wanda(model, tokens: Tensor, dense: bool) -> Result:
    import esparse

    esparse.prune_weights(model, tokens, "2:4", method="wanda", scope="linear", dense=dense, batch_size=BATCH)
    return None, model


def load_theirs(folder: Path) -> nn.Module:
    """As llm-compressor's documentation has it, with its own experts."""
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe
    from transformers import AutoModelForCausalLM

    with load_quantizable_moe():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _oneshot(model, tokens: Tensor, recipe, pipeline: str, batch: int) -> None:
    """On the tokens in their order, running only the experts that they choose, as its example of REAP does."""
    from llmcompressor import oneshot

    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    options = {"num_calibration_samples": len(rows), "shuffle_calibration_samples": False, "moe_calibrate_all_experts": False}
    oneshot(model=model, dataset=torch.utils.data.DataLoader(rows, batch), recipe=recipe, pipeline=pipeline, **options)


def _reap_theirs(model, tokens: Tensor, pipeline: str = "sequential", batch: int = 1) -> Result:
    from llmcompressor.modifiers.pruning import REAPPruningModifier

    recipe = REAPPruningModifier(sparsity=1 - KEPT / model.config.num_local_experts)
    _oneshot(model, tokens, recipe, pipeline, batch)
    return [*recipe._retained_experts.values()], None


def _wanda_theirs(model, tokens: Tensor, pipeline: str = "sequential", batch: int = 1) -> Result:
    from llmcompressor.modifiers.pruning import WandaPruningModifier

    recipe = WandaPruningModifier(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["lm_head"])
    _oneshot(model, tokens, recipe, pipeline, batch)
    return None, model


WORKS: dict[str, tuple[Callable, Callable]] = {
    "reap": (load, partial(_experts, method="reap")),
    "enumeration": (load, partial(_experts, method="enumerate")),
    "wanda": (load, partial(_wanda, dense=False)),
    "wanda, dense": (load, partial(_wanda, dense=True)),
    "their reap": (load_theirs, _reap_theirs),
    "their reap, 8 at once": (load_theirs, partial(_reap_theirs, batch=BATCH)),
    "their reap, basic": (load_theirs, partial(_reap_theirs, pipeline="basic", batch=BATCH)),
    "their wanda": (load_theirs, _wanda_theirs),
    "their wanda, 8 at once": (load_theirs, partial(_wanda_theirs, batch=BATCH)),
    "their wanda, basic": (load_theirs, partial(_wanda_theirs, pipeline="basic", batch=BATCH)),
}


def kept_weights(model: nn.Module) -> dict[str, Tensor]:
    """The nonzero entries of every pruned linear map, as packed bits, by llm-compressor's names."""
    found = {}
    for name, weight in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            halves = zip(("gate_proj", "up_proj"), weight.chunk(2, dim=1), strict=True)
            found |= {
                name.replace("gate_up_proj", f"{e}.{part}.weight"): w for part, half in halves for e, w in enumerate(half)
            }
        elif name.endswith("experts.down_proj"):
            found |= {name.replace("down_proj", f"{e}.down_proj.weight"): w for e, w in enumerate(weight)}
        elif name.endswith("_proj.weight"):
            found[name] = weight
    return {name: torch.from_numpy(numpy.packbits((weight != 0).numpy())) for name, weight in found.items()}


def work(name: str, folder: Path) -> None:
    torch.set_num_threads(1)
    loaded, call = WORKS[name]
    model, tokens = loaded(folder), load_file(folder / "tokens.safetensors")["tokens"]
    started = time.process_time()
    kept, pruned = call(model, tokens)
    seconds = time.process_time() - started
    result = {"seconds": seconds, "peak_mib": peak_memory() / 2**20, "kept": kept}
    result["transformers"] = transformers.__version__
    (folder.parent / f"{name}.json").write_text(json.dumps(result))
    if pruned is not None:
        save_file(kept_weights(pruned), folder.parent / f"{name}.safetensors")


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]))
