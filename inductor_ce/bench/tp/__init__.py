"""Losses over a vocabulary that ranks share: `python -m inductor_ce.bench tp`, under torchrun."""
