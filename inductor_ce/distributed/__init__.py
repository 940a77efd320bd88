"""Rows whose vocabulary is spread over the ranks of a process group.

In:   the statistics of this rank's columns.
Out:  those of whole rows, by one all-gather and the law of `ops.combine`; DTensors as a user's code has them.

    shards         statistics over a process group, the gradient without a collective
    by_hand        the same where each rank knows which labels are its own
    placements     DTensor logits: which placements can be read, and what is made of them
    local_logits   which of them a rank can make by itself, when somebody reads them

What is decided here follows from placements and global shapes alone, so that every rank decides alike.
"""
