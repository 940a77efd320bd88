"""What every room may need, and what knows nothing of losses.

In:   nothing.
Out:  options as a user sets them, findings as he reads them, errors, and torch's private names.

    errors       the exceptions that users can meet
    options      what a user may set, checked once at the door
    strategies   the names of the ways to compute a head
    findings     a Site for each loss that is rewritten, a Miss for each that is not, and the user's line
    sources      which files of ours made what is compiled
    failsafe     what happens when a step of ours fails: the program runs on, and somebody is told
    compat/      the only files that name what torch keeps private
"""
