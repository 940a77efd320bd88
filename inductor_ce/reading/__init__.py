"""What a node is: a torch-level graph read in the algebra.

In:   a torch-level graph, as Dynamo gives it to the backend.
Out:  a `Reading`: for each node that is made of logits its value, and the labels and tensors that it is made
      with. Nothing is changed, but that `chosen` adds logits of rows, and `class_ranges` masks, which are
      forgotten where they are not used; and nothing is decided about what may be replaced.

    steps        the table: a row has a step's spellings, function and traits; `spellings` reads nodes by it
    row_views    what views do to the rows of a value; `views` reads them backwards
    values       the values that nodes have, and the Reading
    diagonals    what is picked on a diagonal
    chosen       rows that are chosen of log-probabilities, as logits of their own
    context      what a step may ask about the node it reads
    divergences  sums over several tensors of logits beside each other: the `sides`; joint, what the nodes
                 between log-probabilities and such a sum are; constants, numbers among them;
                 tails, what adds such sums up; zeroed, entries set where probabilities are 0;
                 twins, tensors that are made twice;
                 entries, sums of what each entry makes by itself; own, comparisons with what is
                 made of the same logits; moved, entries of chosen rows, or seen by views
    parts        losses whose ranks know themselves that each has some of the classes: the steps;
                 part_reader, what the storages of such a program hold while it runs, and gathered,
                 what they hold of several ranks; row_numbers, what has a number for each row, also
                 where there is one column; part_values, what is known then
    blocks       losses whose classes come in blocks, with statistics carried from one to the next: the steps;
                 block_reader, what storages hold then, and label_ranges, which labels a block has
    aten         lets graphs of ATen operators call torch, before anything is read
    recognise    goes through the graph; the steps' functions by subject: losses, reductions, arithmetic over
                 operands, indexing (views), picks (by labels), targets (one-hot, masks, smoothed), joining
                 (loops), left_out (entries that masks leave out), replaced (by scatter), class_ranges
"""
