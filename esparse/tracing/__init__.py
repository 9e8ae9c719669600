"""One pass over a calibration set gives a trace; everything else is arithmetic on the trace.

In: a model and token ids. Out: for every MoE layer the router logits, the experts each token can reach and the Gram matrix of
their contributions (`trace`, `recorder`, `walk`); from these the loss of any subset and of any skipping (`losses`, `removals`)
and statistics of logits alone (`statistics`).
"""
