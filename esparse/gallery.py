"""What the figures are, in words: for the README, for the notebooks' images, for who cannot see them."""

from .files import checkout

# Of each figure: where it is in the paper, and what it shows, for who cannot see it.
PAST = "past the paper"
ABOUT: dict[str, tuple[str, str]] = {
    "00_moe_layer": ("Fig. 2", "One token in an MoE layer: bars of its routing weights for all experts; the best run."),
    "00_method": (
        "Fig. 3",
        "Left, three subsets of experts with their losses, the best one in colour; right, tokens as bars of their two routing "
        "weights, the second hatched where it is skipped.",
    ),
    "00_quickstart": (PAST, "Bars of held-out perplexity on both corpora: all experts, pruned, pruned and skipping."),
    "01_frequency": (
        "Section A.1",
        "Heatmaps, layers by experts: the share of tokens each expert gets on either corpus, and the difference.",
    ),
    "01_co_selection": ("Fig. 5", "Heatmaps, expert by expert, for three layers and both corpora: how often a pair is chosen."),
    "02_kept_experts": ("Fig. 4", "A grid of experts over layers: which stay for both corpora, which for one only."),
    "02_divergence": (
        "Section 3.2, remark",
        "Lines over layers: how far apart the routing of the two corpora is, and that of two draws of one corpus.",
    ),
    "03_loss_landscape": ("Eq. 3", "For each layer the losses of all subsets, rising, with the choices of three methods."),
    "03_held_out": ("Eq. 3", "Points: each subset's loss on calibration and on held-out tokens, layer by layer."),
    "03_methods": ("Tables 2, 6", "Perplexity and task scores over the experts kept, a line a method; the paper's beside."),
    "03_calibration_size": (
        "Table 7",
        "Held-out loss over the optimum's against the size of the calibration set; the paper's averages beside.",
    ),
    "04_ratios": ("Section 3.3", "Histograms of the ratio of the second to the first routing weight, layer by layer."),
    "04_betas": ("A.7", "Median beta over layers for both corpora, with another draw dotted; the paper's 64 beside."),
    "05_trade_off": ("Table 5", "Loss and perplexity over the share of second experts dropped, a line for each r."),
    "05_layers": ("Section 3.3", "Bars over layers: the share of second experts dropped, and the loss that causes."),
    "05_scores": ("Table 5", "Bars of task scores without skipping, at the median beta and for top-1; the paper's beside."),
    "05_betas_of_pruned": ("Section 4.3", "Lines over layers: betas of three origins for a pruned model, and what each drops."),
    "05_expert_distances": ("A.2", "Histograms of the distance between two experts' outputs over its mean, layer by layer."),
    "05_tail_rule": ("A.2", "A falling curve: experts a token runs over beta, for more than two experts a token."),
    "06_memory_and_speed": (
        "Fig. 1, Tables 1, 5, 9",
        "Six panels of bars and lines: memory, tokens per second and gains measured here, and the paper's on grey.",
    ),
    "06_roofline": (PAST, "Arithmetic per second over arithmetic per byte, points below the roof of memory and arithmetic."),
    "07_domain_specific": (
        "Table 3",
        "Perplexity on both corpora and exact match over the experts kept, a line for each calibration corpus with bars over "
        "three seeds; the paper's GSM8K beside.",
    ),
    "07_betas": ("Table 8", "Quality by whose betas skipping uses, a line for each r; the paper's GSM8K beside."),
    "08_recovery": ("Section 4.2", "Points: the share of the loss won back over seconds and trained parameters."),
    "08_fine_tuning": ("Table 4", "Exact match before and after fine-tuning, full model and pruned ones; the paper's beside."),
    "09_weight_pruning": ("Table 1", "Perplexity on both corpora over the sparsity of the experts' weights, a line a score."),
    "09_equal_bytes": (PAST, "Quality over the bytes left of the experts, for pruned experts and for pruned weights."),
    "10_searches": (PAST, "Points, a layer each: losses of the search methods over the best known, for several models."),
    "10_search_costs": (PAST, "Seconds over the number of experts: trace, searches, and enumeration far above them."),
    "11_explorer": (PAST, "The explorer's views at their start: experts, pairs, loss landscape, skipping, trade-off."),
}


def manifest() -> dict[str, dict[str, str]]:
    """Every figure: its notebook, where it is in the paper, what it shows, the numbers it is drawn from, and the command
    that draws it again."""
    return {
        name: {
            "notebook": next((checkout() / "notebooks").glob(f"{name[:2]}_*.ipynb")).name,
            "paper": paper,
            "shows": alt,
            "data": f"figures/{name}.json",
            "command": f"python -m esparse figures {name}",
        }
        for name, (paper, alt) in ABOUT.items()
    }
