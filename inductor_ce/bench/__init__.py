"""Timings on a GPU: `python -m inductor_ce.bench ce` and `head`."""
