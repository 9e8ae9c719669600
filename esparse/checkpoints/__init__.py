"""Folders of safetensors: read as stock transformers reads them, traced and pruned one layer in memory at a time, written in
the published layout.

In: a folder or a hub id. Out: a model, a trace, a plan, a pruned folder that stock transformers loads, or a
one-sentence error.
"""
