"""What a release of torch cannot do by itself: a test that meets it is skipped, and torch's error named."""

import pytest
import torch

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


def before(*release: int) -> bool:
    """Whether this torch is older."""
    return release > TORCH


# Until which release, and all of what its error says. They are errors of tracing the user's own program.
LIMITS = {
    (2, 12): (
        (
            "Dynamo failed to run FX node with fake tensors",
            "Redistribution from one partial type (P(sum)) to another (P(avg)) is unsupported.",
        ),
        ("Dynamo failed to run FX node with fake tensors", "use_strided_shard_as_shard_order is True, but"),
    )
}


def limit_of(error: str) -> str | None:
    """What torch says that it cannot, where this release is known for it."""
    known = (said for release, errors in LIMITS.items() if before(*release) for said in errors)
    return next((said[-1] for said in known if all(part in error for part in said)), None)


def skip_if_limit(error: Exception) -> None:
    limit = limit_of(str(error))
    if limit is not None:
        pytest.skip(f"torch {torch.__version__}: {limit}")
