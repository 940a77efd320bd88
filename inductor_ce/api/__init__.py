"""The outer door: what users call, and what Inductor calls.

In:   a user's options and functions; graphs from Inductor's two hooks.
Out:  rewritten graphs, counters, log lines, reports.

    passes        the two passes with their cache keys; `pass_slots`, where Inductor's configuration has them
    install       for every torch.compile with Inductor; `backend`, for one
    explain       what is fused, what is not, and why: a `report`
    counts        what a process has counted
    functional    the same losses by hand; `arguments`, what they refuse; `loss_formula`, what they compute
"""
