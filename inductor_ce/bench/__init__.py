"""Timings, on GPUs but for `recognise`: `python -m inductor_ce.bench` with `ce`, `head`, `tp` or `recognise`.

In:   the command line.
Out:  tables, and records with pictures in `results/`; `tp` runs under torchrun.
"""
