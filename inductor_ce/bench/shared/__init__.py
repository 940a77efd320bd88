"""What the benchmarks have in common.

options          of the command line
measure          time and memory on a GPU
compilers        plain torch.compile, and torch.compile with inductor_ce
against_plain    what both take for one loss
peers            other libraries, for those that are installed
labels           which labels are ignored
losses           the losses that are timed, and their errors against float64
record           where, when, and of which version
tables           text; `pictures`, bars
"""
