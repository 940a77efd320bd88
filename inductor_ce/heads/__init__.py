"""The head: the linear layer before the statistics, so computed that the logits are never all in memory.

In:   a joint graph of forward and backward, with `row_stats` and `row_grad`, and the options.
Out:  the same with each head in token chunks, vocabulary slabs or forward only, or whole with the reason.

    find            the head of a `row_stats`, in the joint graph; `kinds` of its nodes, and `calls`, `sizes`,
                    what they are given
    no_head         why there is none, in words
    plan            numbers in, a plan out, with its `extra_memory`; never looks at free memory or a clock
    agreed          of how many rows a plan is, where ranks have to exchange alike
    proof           may the gradient be made in the forward? by `row_locality`, of which rows a value is,
                    at the sizes of the example and at `other_sizes`; `facts`, what is known of a node, by
                    `row_rules`
    counted_rows    which rows count: those of which anything can be seen, by `where` values are something;
                    `finite_rows`, what a mask that multiplies can hide; `row_numbers`, of which rows they are
    skip            are the others skipped? and what is told of it
    packing         rows that count, before others; `ranges`, of which pieces are
    factors         what products multiply: 16-bit numbers that were cast to float32, as they were
    pieces          a head for some of its rows or columns
    teachers        another head, which makes weights for rows and classes; `taught`, for some of its rows,
                    of which `cut_rows` may be none
    sides           what is counted, and told, of the sides of a divergence, each with a linear layer
    token_chunks    some rows at a time; vocab_slabs, some columns
    rolled          token chunks as one operator
    read_once       whether one kernel makes statistics and gradient of a piece
    whole_logits    logits in memory, whose gradient is made with their statistics
    between         what lies between statistics and coefficients, made anew; `row_programs`, read as a
                    program of a row alone; `chained`, what lies before, as one of an element; `steps` of both
    loops           heads of one weight, as a user's loop over chunks has them, that add to one gradient
    exits           the gradients of a head: by `gradients`, what products make, and by `sums`, others;
                    `narrow_sums`, of pieces in 16 bits
    edited_inputs   copies of inputs that the forward edits and of which the backward makes something
    recompute       the chain before logits that are kept is rebuilt in the backward, not saved
    nodes           new tensors, and operators that write to some
    fuse            the pass: find, plan, prove, rearrange
"""
