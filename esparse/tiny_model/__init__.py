"""The embedded default model, made from nothing: synthetic text and tasks, recipe, training, and the building of `data/`.

In: seeds. Out: documents, a tokenizer, a trained tiny Mixtral, lm-eval tasks.
"""
