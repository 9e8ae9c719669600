"""esparse: expert-level sparsity in Mixture-of-Experts language models.

One calibration pass gives a trace; pruning, skipping and their losses are arithmetic on it.

    model, tokenizer = esparse.load_model()
    trace = esparse.trace(model, esparse.calibration_tokens("web", tokenizer, sequences=64, length=256))
    plan = esparse.search_experts(trace, 6)
    esparse.prune(model, plan)
"""

from importlib import import_module

from .environment import check

check()  # before the other modules: they import torch and transformers

__version__ = "0.1.0"

# The module of each public name, imported when one of its names is first used: torch and transformers take seconds to import,
# and the help of the command line needs neither.
_PUBLIC = {
    ".checkpoints.by_output": ("choose_by_output",),
    ".checkpoints.compare": ("kept_experts",),
    ".checkpoints.estimate": ("preflight",),
    ".checkpoints.jobs": ("prune_checkpoint", "prune_weights_checkpoint", "trace_checkpoint"),
    ".checkpoints.models": ("load_model", "save_model"),
    ".corpora": ("calibration_tokens",),
    ".experiments.run": ("Run",),
    ".files": ("measured", "paper", "versions"),
    ".measure.behaviour": ("check_folder",),
    ".measure.evaluation": ("evaluate", "perplexity"),
    ".measure.timing": ("measure_generation", "measure_memory"),
    ".moe.layers": ("moe_layers",),
    ".pruning.certainty": ("certainty",),
    ".pruning.mask": ("masked", "prune"),
    ".pruning.mixture": ("mixtures",),
    ".pruning.novices": ("fold_changes", "mean_changes", "mean_outputs", "novices"),
    ".pruning.plan": ("PruningPlan",),
    ".pruning.price": ("price",),
    ".pruning.scores": ("expert_scores", "super_experts"),
    ".pruning.search": ("search_experts", "subset_losses"),
    ".pruning.skipping": ("disable_skipping", "enable_skipping", "skipped_shares", "skipping"),
    ".pruning.weights": ("prune_weights",),
    ".recovery": ("recover", "scale_experts"),
    ".tracing.losses": ("expert_scales", "reconstruction_loss"),
    ".tracing.recorder": ("trace",),
    ".tracing.statistics": ("co_selection", "dropped_share", "median_betas", "selection_frequency"),
    ".tracing.trace": ("LayerTrace", "Trace"),
}
_HOMES = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(_HOMES[name], __name__), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
