"""The outer door: what users call, and what Inductor calls.

In:   a user's options and functions; graphs from Inductor's two hooks.
Out:  rewritten graphs, counters, log lines, reports.

    passes        the two passes with their cache keys; `pass_slots`, where Inductor's configuration has them
    install       for every torch.compile with Inductor; `backend`, for one
    deferral      round compile_fx: tells what is fused (telling), and lets returned logits be lazy_logits,
                  made of a lazy_source, with lazy_functions, lazy_questions, lazy_nodes, lazy_trees and
                  lazy_memory, and as lazy_inputs of others, which return lazy_views of them
    defer         linear layers whose logits are lazy, for losses that are compiled alone
    explain       what is fused, what is not, and why: a `report`
    counts        what a process has counted
    functional    the same losses by hand; `arguments`, what they refuse; `loss_formula`, what they compute
"""
