"""The loss of given logits: `python -m inductor_ce.bench ce`."""
