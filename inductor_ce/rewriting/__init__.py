"""What may be replaced, and by what.

In:   a `Reading`, and the options.
Out:  the same graph with one `row_stats` a group and torch operations on its rows; refusals, with reasons.

    legal             which values may be replaced; `groups`, together and where
    escapes           who else needs the log-probabilities, and which losses were not read
    normalisers       which of them are losses by themselves
    kept              log-probabilities that the program keeps, beside the loss
    compared          who compares what a loss has of a row with its entries, and is given it as written
    rewrite           replaces a group, by nodes that `statistics` makes for the symbols of its expressions;
                      made_of_rows, for those that have one number of a row
    weighed           which rows hold the sums that tensors from outside weigh, or leave columns out of
    arrange           brings tensors to [N, V] and back; `rematerialise`, to the place where they are needed
    beside            what stands on the ranks beside DTensor logits, and who reads a loss there
    layouts           where the rows are, on one device or on a mesh: the one seam of distribution
    edits             edits in place of what has classes, as functions, before all else
    whole_sums        sums of all logits at once, as of those of each row
    divergences       losses between several tensors of logits, before all others
    some_classes      normalisers over some classes' log-probabilities, as differences of two
    ranges_beside     ranges of the classes of log-probabilities that are read beside their loss
    turned_products   a product whose rows are the classes, as the transpose of one of which they are columns
    picked_mixtures   labels picked after probabilities are added, as of each of these: mixtures
    by_hand           losses that ranks make together by their own collectives, of one all-gather: part_rows
    column_blocks     losses of which statistics are carried over blocks of columns, as losses of all columns;
                      one_product, their logits as one product
    padded_vocabulary brings columns that are cut off, or filled, to where heads are found with them;
                      filled_columns, the filled ones; padding, which columns a slice keeps
    joined_columns    likewise columns that are put beside logits
    joined_rows       losses of parts of a linear layer's rows, by one operator
    joined_steps      probabilities of steps, as those of joined logits; joined_layers, logits of steps, as
                      those of joined hidden states; filled_steps, what is written step by step, as a stack
    lone_parts        the only part that a tensor is cut into, as the tensor
    stacked_parts     what is taken of several heads' logits that are stacked, of the heads' own
    chosen_rows       likewise where rows are chosen of a linear layer's result
    folded_rows       likewise where rows are cut off hidden states before a frozen layer
    promises          returned logits that need not be there; find_recipe, by recipe_search and linear_layers,
                      how they are made again: recipes
    returned_logits   who else has the logits in memory, and what is returned in their place
"""
