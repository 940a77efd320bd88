"""The backend of torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule

from ..common.compat.inductor import compile_fx, list_mode_options, list_options
from ..common.compat.versions import check_torch
from ..common.errors import OptionError
from ..common.options import DROP_LOGITS, make_options, option_names
from ..ops import lowering
from .deferral import compile_deferring
from .install import with_passes


def inductor_ce_backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Any:
    """`torch.compile(f, backend="inductor_ce", mode=..., options={...})`. Changes nothing global.

    Args:
        gm: the torch-level graph.
        example_inputs: its inputs.
        mode: as for the backend "inductor".
        options: fields of `Options` and options of Inductor, side by side.

    Raises:
        OptionError: an option that neither has, or of the wrong value.
        UnsupportedTorchError: a torch outside the supported range.
    """
    check_torch()
    lowering.register()
    ours, patches = _split(options or {})
    options_of_ours = make_options(ours)
    patches = {**(list_mode_options(mode) if mode else {}), **patches}
    patches |= with_passes(patches, options_of_ours)
    compile = functools.partial(compile_fx, config_patches=patches)
    return compile_deferring(gm, example_inputs, compile, options_of_ours, patches)


def _split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(our options, Inductor's)."""
    inductors = {name.replace("-", "_") for name in list_options()}
    ours = {name: value for name, value in options.items() if name in (*option_names(), DROP_LOGITS)}
    rest = {name.replace("-", "_"): value for name, value in options.items() if name not in ours}
    unknown = sorted(set(rest) - inductors)
    if unknown:
        raise OptionError(
            f"unknown option {', '.join(map(repr, unknown))}; valid options are "
            f"{', '.join(option_names())}, and those of torch._inductor.list_options()"
        )
    return ours, rest
