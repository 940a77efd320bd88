"""The waist: all before it emits these operators, all after it lowers them.

In:   from `rewriting`, calls of `row_stats`; from `heads`, its pieces, and the products round them.
Out:  Inductor IR: Triton templates on GPUs, Inductor's own loops elsewhere.

    table           the statistics, each one entry; `rows`, those of them that a call packs
    terms           the language in which an entry says what a column adds
    operators       row_stats and row_grad, and what they mean
    one_read        both as one operator, where nothing but a `row_program` lies between, and `chains` about
    divergences     the operators of losses between several sets of logits, and of sums of entries, of which
                    `entries` has the formulas; `arithmetic`, what these are computed with
    law             how statistics of blocks combine, as plain values
    combine         the law by which blocks of columns make a row
    as_read         what a tensor was before it is edited
    group_rank      the rank of this process, as a value
    counted         rows that count, before those that do not
    products        the matrix products of heads, in order and in place; `label_products`, those without
                    the entries at labels; `product_kernels` and `label_kernels` beside them, and
                    `counted_kernels`, where the device alone knows how many rows count, and `sum_kernels`
    chunks          a head in token chunks as one operator, with `chunk_memory`; `one_read_kernel`, the
                    template of `one_read` as a kernel that it launches
    gemm            one matrix product, by a library
    launch          launches a Triton kernel again, and `tapes` all that an operator has launched; `ahead`,
                    compiles what will be launched
    verified        both ways side by side, for the option `verify`
    lowering        to `templates/`, or to `loops` and `divergence_loops`; `one_read_lowering`, what is read
                    once, and `with_templates`, what both share
"""

from .divergences import DIVERGENCE, DIVERGENCE_GRAD
from .one_read import ROW_STATS_GRAD, SOME_ROW_STATS_GRAD
from .operators import (
    MAX_COLUMNS,
    NO_SITE,
    ROW_GRAD,
    ROW_GRAD_AGAIN,
    ROW_STATS,
    SOME_ROW_GRAD,
    SOME_ROW_STATS,
    row_grad,
    row_stats,
    stats_dtype,
    stats_dtype_of,
)
from .rows import Row, Rows
from .table import (
    ARGMAX,
    DOT,
    EXPDOT,
    EXPZDOT,
    KEPT_DOT,
    KEPT_EXPDOT,
    KEPT_MASS,
    MASS,
    MAX,
    PICK,
    PICKS,
    POWER,
    SEEN_DOT,
    SEEN_MASS,
    SUM,
    SUMEXP,
    SUMEXPZ,
    TOP,
)

__all__ = [
    "ARGMAX",
    "DIVERGENCE",
    "DIVERGENCE_GRAD",
    "DOT",
    "EXPDOT",
    "EXPZDOT",
    "KEPT_DOT",
    "KEPT_EXPDOT",
    "KEPT_MASS",
    "MASS",
    "MAX",
    "MAX_COLUMNS",
    "NO_SITE",
    "PICK",
    "PICKS",
    "POWER",
    "ROW_GRAD",
    "ROW_GRAD_AGAIN",
    "ROW_STATS",
    "ROW_STATS_GRAD",
    "SEEN_DOT",
    "SEEN_MASS",
    "SOME_ROW_GRAD",
    "SOME_ROW_STATS",
    "SOME_ROW_STATS_GRAD",
    "SUM",
    "SUMEXP",
    "SUMEXPZ",
    "TOP",
    "Row",
    "Rows",
    "row_grad",
    "row_stats",
    "stats_dtype",
    "stats_dtype_of",
]
