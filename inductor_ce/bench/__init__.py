"""Timings on GPUs: `python -m inductor_ce.bench ce` and `head`, and `tp` under torchrun."""
