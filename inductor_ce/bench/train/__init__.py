"""A training step of a whole model, as its user writes it: `python -m inductor_ce.bench train`."""
