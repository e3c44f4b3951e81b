"""Text encoders: models of transformers, whose loaders of bitsandbytes and torchao differ in a few
words from those of diffusers.

A module to skip is compared with the names of modules: from their beginning, or to their end. Files
may call modules otherwise, since transformers renames what it loads (language_model.model.layers
is model.language_model.layers by then), so each is said in every way that it may be called.

Source: transformers quantizers/quantizers_utils.py (should_convert_module), conversion_mapping.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from dqconvert.formats.form import FileContext

FILE = "model.safetensors"

HEADS = ("lm_head",)
"""Linears that a loader would find packed where a model makes them of its embedding."""


def is_one(context: FileContext) -> bool:
    """Whether the model is one of transformers."""
    return context.library == "transformers"


def renamed(context: FileContext) -> FileContext:
    """The file with its unquantized linears under the names that transformers may look for."""
    packed = {part for name in context.layers for part in _beginnings(name)}
    roots = dict.fromkeys(_root(name, packed) for name in context.kept)
    spelt = dict.fromkeys(other for root in roots for other in _spellings(root))
    return replace(context, kept=tuple(dict.fromkeys((*spelt, *HEADS))))


def _beginnings(name: str) -> Iterator[str]:
    parts = name.split(".")
    yield from (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _root(name: str, packed: Collection[str]) -> str:
    """The outermost module around a linear that holds no packed one."""
    return next((part for part in _beginnings(name) if part not in packed), name)


def _spellings(name: str) -> Iterator[str]:
    yield name
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdecimal()), 0)
    if len(parts) == 1:
        yield f"model.{name}"
    elif len(parts) == 2:
        yield parts[1]
    elif place > 1:
        yield ".".join(parts[place - 1 :])
