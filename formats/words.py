"""What a checkpoint says of its own tensors: its metadata, and small tensors that hold JSON.

    <layer>.weight.quant_state.bitsandbytes__nf4    U8 [bytes]      the shape of a flat weight

Torch-free: the few bytes of these tensors are all that is read.

Source: bitsandbytes/functional.py (QuantState.as_dict).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.formats.container import Container
from dqconvert.formats.source import Source

STATE = "weight.quant_state.bitsandbytes__"
"""How the names of such tensors end, before the kind of their codes."""

LONGEST = 4096
"""Bytes from which a tensor is none of them."""


def told(source: Source) -> Mapping[str, Any]:
    """The metadata of a checkpoint, and the text of such tensors under their names.

    SourceError if bytes lack; what is no text is left out.
    """
    if not isinstance(source, Container):
        return source.metadata
    found = {}
    for name, info in source.infos.items():
        plain = info.dtype == "U8" and len(info.shape) == 1 and info.nbytes <= LONGEST
        if plain and f".{STATE}" in name:
            found[name] = source.stored(name).decode(errors="replace")
    return {**source.metadata, **found}
