"""The final linear layer with its loss: `python -m inductor_ce.bench head`."""
