"""The memory in use, read again and again while something else runs."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Samples = list[tuple[float, int]]
"""(time by `time.perf_counter`, bytes), in order."""


@contextmanager
def sampled(bytes_in_use: Callable[[], int], seconds: float = 0.004) -> Iterator[Samples]:
    """Within the block another thread fills the list that is given, every so many seconds."""
    samples: Samples = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(seconds):
            samples.append((time.perf_counter(), bytes_in_use()))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def resident_bytes(process: int) -> int:
    """The resident set of a process, from outside of it; 0 where it has ended."""
    try:
        pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
