"""esparse: expert-level sparsity in Mixture-of-Experts language models.

One calibration pass gives a trace; pruning, skipping and what they cost are arithmetic on it.

    model, tokenizer = esparse.load_model()
    trace = esparse.trace(model, esparse.calibration_tokens("web", tokenizer, sequences=64, length=256))
    plan = esparse.search_experts(trace, 6)
    esparse.prune(model, plan)
"""

from .environment import check

check()  # first: with an older transformers the imports below fail deep inside

from .benchmark import measure_generation, measure_memory
from .checkpoints import load_model, save_model
from .corpora import calibration_tokens
from .evaluation import evaluate, perplexity
from .files import measured, paper, versions
from .models import moe_layers
from .preflight import preflight
from .pruning import PruningPlan, masked, prune
from .recovery import choose_by_output, expert_scales, recover, scale_experts
from .runs import Run
from .search import expert_scores, search_experts, subset_losses
from .skips import disable_skipping, enable_skipping, skipped_shares, skipping
from .streaming import prune_checkpoint, prune_weights_checkpoint, trace_checkpoint
from .traces import (
    LayerTrace,
    Trace,
    co_selection,
    dropped_share,
    median_betas,
    reconstruction_loss,
    selection_frequency,
    trace,
)
from .weights import prune_weights

__version__ = "0.1.0"
