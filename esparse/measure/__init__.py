"""Measure quality (perplexity, lm-eval), the memory and speed of generation, and the cost of tracing and searching.

In: a model, or the size of one with random weights. Out: tables of numbers, with the device they were measured on.
"""
