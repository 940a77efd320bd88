"""Timings, on GPUs but for `recognise`: `python -m inductor_ce.bench` with `ce`, `head`, `distil`,
`divergences`, `rows`, `tp`, `train` or `recognise`.

In:   the command line.
Out:  tables, and records with pictures in `results/`; `tp` runs under torchrun.

    cli          the command line
    ce/          the loss of given logits
    head/        the linear layer with its loss
    distil       distillation from two heads, and R-Drop of two passes through one
    divergences  divergences between two sets of given logits
    rows         statistics and gradient of given logits, by one template and by two
    tp/          the same over ranks that share the vocabulary
    train/       a training step of a whole model
    recognise    what recognition costs
    shared/      what these have in common

A benchmark has a `command`, with its options and its record, and a `run`, the loop. What is compared is in
`systems`, `check` finds all about a system but its time, and `render` shows a record as a table and as a
picture. One more benchmark is one more such folder, and a line in `cli`. Of the rooms, `api` and `ops` alone
are imported: what is measured is what users have.
"""
