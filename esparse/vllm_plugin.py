"""Dynamic expert skipping (Section 3.3, A.2) inside vLLM, which calls `register` in each of its processes: an entry point of
`vllm.general_plugins`.

Models with an `esparse.json`, as `save_model` and `prune_checkpoint` write it, skip; all others run as without the plug-in. It
imports torch and vLLM alone, so it repeats the rule of `moe.routers.skip_pairs`. Run with vLLM's CPU build 0.32.0.
"""

from functools import cache, partial

import torch
from torch import Tensor

FILE = "esparse.json"


def register() -> None:
    """Let every MoE layer that vLLM makes from now on look for its beta. A vLLM without the classes that this needs is left as
    it is, with a warning in its log."""
    from vllm.logger import init_logger

    try:
        from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    except ImportError as error:
        init_logger("vllm.esparse").warning("Skipping stays off, since this vLLM has another routing: %s", error)
        return
    stock = MoERunner.__init__

    def initialise(runner, *args, **options) -> None:
        stock(runner, *args, **options)
        if beta := _beta(runner.layer_name):
            install(runner, beta)

    MoERunner.__init__ = initialise


def install(runner, beta: float) -> None:
    """Put the rule behind the router of a layer's `MoERunner`."""
    router = runner.router
    router.select_experts = partial(_select, router.select_experts, beta, router.top_k, router.renormalize)
    runner.routed_experts.forward_monolithic = _refuse


def skip(weights: Tensor, experts: Tensor, beta: float, renormalise: bool) -> tuple[Tensor, Tensor]:
    """The routing weights and expert numbers [tokens, k] after skipping, in the order of falling weight.

    A dropped pair has the weight 0, and the number of the token's first expert, which is read anyway.
    """
    weights, order = weights.sort(dim=1, descending=True, stable=True)
    experts = experts.gather(1, order)
    ratios = weights.flip(1).cumsum(1).flip(1)[:, 1:] / weights.cumsum(1)[:, :-1]
    dropped = torch.cat([torch.zeros_like(weights[:, :1], dtype=torch.bool), ratios < beta], 1)
    kept = weights.masked_fill(dropped, 0)
    if renormalise:
        rescaled = kept * (weights.sum(1, keepdim=True) / kept.sum(1, keepdim=True))
        kept = torch.where(dropped.any(1, keepdim=True), rescaled, kept)  # rows of padding may sum to 0
    return kept, torch.where(dropped, experts[:, :1], experts)


def _select(stock, beta: float, k: int, renormalise: bool, *args, **options) -> tuple[Tensor, Tensor]:
    weights, experts = stock(*args, **options)
    if weights.shape[1] != k:
        raise ValueError(f"{FILE} asks for skipping, but vLLM routes to the shared experts, too: turn their fusion off.")
    return skip(weights, experts, beta, renormalise)


def _refuse(*args, **options) -> None:
    raise ValueError(f"{FILE} asks for skipping, but this kernel chooses the experts itself: take another --moe-backend.")


def _beta(layer: str) -> float | None:
    """The beta of a layer, by its name such as model.layers.3.mlp.experts; None where the model's file has none."""
    from vllm.config import get_current_vllm_config

    model = get_current_vllm_config().model_config
    number = next((int(part) for part in layer.split(".") if part.isdecimal()), None)
    return None if model is None else _betas(model.model, model.revision).get(number)


@cache
def _betas(model: str, revision: str | None) -> dict[int, float]:
    """The betas of a folder or hub id, by the number of the decoder layer. Raises ValueError for a file without these."""
    from vllm.logger import init_logger
    from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

    held = get_hf_file_to_dict(FILE, model, revision)
    if held is None:
        return {}
    lists = [held.get(name) if isinstance(held, dict) else None for name in ("layers", "betas")]
    if not all(isinstance(part, list) and part and len(part) == len(lists[0]) for part in lists):
        raise ValueError(f"{FILE} of {model} needs one beta for each of its 'layers': write it anew with esparse.save_model.")
    betas = dict(zip(*lists, strict=True))
    init_logger("vllm.esparse").info("Skipping experts in %d layers, by the betas of %s", len(betas), FILE)
    return betas
