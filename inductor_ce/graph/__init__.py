"""Helpers for graphs of torch.fx, whoever made them.

In:   torch-level graphs and joint graphs, with example values in the meta of their nodes.
Out:  answers about them, and new nodes in them that can be taken back.

    shapes     the tensors that nodes stand for, and their sizes
    walk       from a node to those beside it
    timeline   versions of aliased tensors and gradient modes: a torch-level graph is not functional
    functions  calls of autograd.Functions, each a forward and a backward
    exported   examples for graphs that Dynamo did not capture
    builder    adds nodes with their example values, and can undo it; `examples` makes these
"""
