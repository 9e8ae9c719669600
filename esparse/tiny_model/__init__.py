"""The embedded default model, made from nothing: synthetic text and tasks, a tokenizer, training, and `data/`."""
