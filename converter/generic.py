"""A diffusers transformer of no known family: what its names alone tell. Torch-free.

Blocks are the outermost lists of modules that count from zero; linears are the matrices in them.
No dialect but the model's own is known, no input is known to be shared, and nothing is known to be
sensitive, so such a conversion is verified less than those of families with a table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dqconvert.converter.family import Entry, Family, Infos, Linear

NAME = "generic"
NARROW = 32
"""Matrices with a side below this are tables or embeddings of numbers, not linears."""

_ROLES = (
    (
        "modulation",
        re.compile(r"mod\b|modulat|ada_?ln|norm.*\.linear|scale_shift|time_proj|t_block"),
    ),
    ("attention", re.compile(r"att|to_[qkv]\b|qkv|add_[qkv]_proj|to_out|to_add_out")),
)
"""How names tell the role of a linear; those of none of these are of the feed-forward."""

_TABLES = re.compile(r"embed|_table|pos_|norm\.weight|norm_[qk]")
"""Matrices that are looked up or multiplied by element."""


def family_of(infos: Infos, config: Mapping[str, Any]) -> Family | None:
    """A family made for one checkpoint; None where its config names no model or no block is told.

    infos: names as diffusers has them; config: its config.json, whose class is the title.
    """
    title = str(config.get("_class_name", ""))
    if not title:
        return None
    blocks = _blocks(infos)
    linears = tuple(
        Linear(name.removesuffix(".weight"), _role(name))
        for name, info in infos.items()
        if name.startswith(tuple(f"{one}." for one in blocks)) and _is_linear(name, info.shape)
    )
    if not linears:
        return None
    first = linears[0].name
    return Family(
        name=NAME,
        title=title,
        aliases={},
        licenses={},
        signature=(f"{first}.weight",),
        hidden=f"{first}.weight",
        blocks=blocks,
        linears=linears,
        dialects={"diffusers": _entries(infos, {linear.name for linear in linears})},
        sources=("diffusers",),
        config_of=lambda infos: {},
        facts=lambda dialect, config: {},
        prefixes=(),
    )


def is_generic(family: Family) -> bool:
    """Whether a family was made for one checkpoint."""
    return family.name == NAME


def _blocks(infos: Infos) -> tuple[str, ...]:
    """The outermost module lists that hold matrices and count 0, 1, ... without a gap."""
    found: dict[str, set[int]] = {}
    for name, info in infos.items():
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdecimal()), 0)
        if place and len(info.shape) == 2:
            found.setdefault(".".join(parts[:place]), set()).add(int(parts[place][:9]))
    return tuple(
        blocks
        for blocks, numbers in found.items()
        if len(numbers) > 1 and numbers == set(range(len(numbers)))
    )


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    leaf = name.endswith(".weight") and len(shape) == 2 and min(shape) >= NARROW
    return leaf and _TABLES.search(name.split(".", 2)[-1]) is None


def _role(name: str) -> str:
    return next((role for role, words in _ROLES if words.search(name.lower())), "mlp")


def _entries(infos: Infos, linears: set[str]) -> tuple[Entry, ...]:
    """Every module by its own name: linears as such, other tensors one by one."""
    found: dict[str, Entry] = {}
    for name in infos:
        module = name.rpartition(".")[0]
        own = f"{module}.*" if module in linears else name
        bias = own == name or f"{module}.bias" in infos
        found.setdefault(own, Entry(own, (own,), bias=bias))
    return tuple(found.values())
