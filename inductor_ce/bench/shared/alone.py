"""A peer in a process of its own: its crash, or a compilation without end, costs nobody else's figures."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from .peers import NotOffered


def alone(what: Callable[..., Any], *args: Any, limit_s: float, start: str = "spawn") -> Any:
    """what(*args), from a new process; or NotOffered where it raises, dies, or takes over `limit_s` seconds.

    Args:
        start: how processes start. CUDA allows "spawn" alone, for which `what` and `args` must pickle.
    """
    context = multiprocessing.get_context(start)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, what, args))  # type: ignore[attr-defined]
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit_s):
            return NotOffered(f"failed: not done after {limit_s:.0f} s")
        return receiver.recv()
    except EOFError:
        process.join()
        return NotOffered(f"failed: its process ended with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()
        receiver.close()


def _send(sender: Connection, what: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        found = what(*args)
    except Exception as error:  # a peer may raise anything
        found = NotOffered.because(error)
    sender.send(found)
