"""The model families. This folder is the registry: a module with FAMILY is a family. Torch-free."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from dqconvert.converter.family import Family
from dqconvert.quantizers.errors import UnknownName


@cache
def families() -> Mapping[str, Family]:
    """All families by name."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(__path__):
        family: Family = importlib.import_module(f"{__name__}.{module.name}").FAMILY
        if family.name in found:
            raise ValueError(f"two families are called '{family.name}'")
        found[family.name] = family
    return MappingProxyType(dict(sorted(found.items())))


def family(name: str) -> Family:
    """The family of that name; UnknownName with near names otherwise."""
    try:
        return families()[name]
    except KeyError:
        raise UnknownName("family", name, families()) from None


@cache
def aliases() -> Mapping[str, str]:
    """Short model names of all families, each with its Hub id."""
    return MappingProxyType({k: v for one in families().values() for k, v in one.aliases.items()})


@cache
def sources() -> tuple[str, ...]:
    """The dialects that checkpoints come in; others are written by targets only."""
    return tuple(dict.fromkeys(name for one in families().values() for name in one.sources))
