"""Timings on GPUs: `python -m inductor_ce.bench ce`, and `tp` under torchrun."""
