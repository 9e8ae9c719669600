"""Choosing experts, weights and (token, expert) pairs to leave out, and applying the choice to a model in memory.

In: a trace, or a model and token ids. Out: a `PruningPlan`, betas, a model that is masked, pruned or skipping.
"""
