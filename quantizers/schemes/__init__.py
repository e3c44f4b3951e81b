"""The schemes. This folder is the registry: a module with SCHEMES adds its schemes. Torch-free."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from dqconvert.quantizers.errors import UnknownName
from dqconvert.quantizers.spec import Scheme


@cache
def schemes() -> Mapping[str, Scheme]:
    """All schemes by name, in alphabetical order."""
    found: dict[str, Scheme] = {}
    for module in pkgutil.iter_modules(__path__):
        for scheme in importlib.import_module(f"{__name__}.{module.name}").SCHEMES:
            if scheme.name in found:
                raise ValueError(f"two schemes are called '{scheme.name}'")
            found[scheme.name] = scheme
    return MappingProxyType(dict(sorted(found.items())))


def scheme(name: str) -> Scheme:
    """The scheme of that name; UnknownName with near names otherwise."""
    try:
        return schemes()[name]
    except KeyError:
        raise UnknownName("scheme", name, schemes()) from None
