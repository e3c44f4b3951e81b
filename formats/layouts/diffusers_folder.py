"""A diffusers model folder whose config.json says how the transformer is quantized. Torch-free.

Runtimes decide by name which linears stay unquantized, each by a rule of its own: some by the whole
name, some by any part of it. A name that would also match a packed layer must not be listed, or the
runtime would read that layer's codes as numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dqconvert.formats.form import FileContext

FILE = "diffusion_pytorch_model.safetensors"

Rule = Callable[[str, str], bool]
"""Whether an entry (first) of the list keeps a module (second) unquantized."""

RUNTIME = "runtime"
"""Where the header says which runtime the file is for, since some of them share a config."""


def metadata(runtime: str) -> dict[str, str]:
    """What diffusers demands of a safetensors header, and the runtime."""
    return {"format": "pt", RUNTIME: runtime}


def said(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The quantization_config, empty if there is none."""
    found = config.get("quantization_config")
    return found if isinstance(found, Mapping) else {}


def joined(context: FileContext, quantization: Mapping[str, Any]) -> dict[str, Any]:
    """The model's config with its quantization_config."""
    return {**context.config, "quantization_config": dict(quantization)}


def dotted(entry: str, module: str) -> bool:
    """SGLang's rule: the entry is the module's name or whole parts of it."""
    return f".{entry}." in f".{module}."


def contained(entry: str, module: str) -> bool:
    """vLLM's rule for modelopt configs: the entry is anywhere in the name."""
    return entry in module


def equal(entry: str, module: str) -> bool:
    """vLLM's rule for all others."""
    return entry == module


def swallowed(entries: Iterable[Any], packed: Iterable[str], rule: Rule) -> list[str]:
    """Packed layers that the runtime would leave unquantized, a line each."""
    listed = [entry for entry in entries if isinstance(entry, str)]
    return [
        f"{layer}: packed, but the config keeps '{entry}' unquantized"
        for layer in packed
        for entry in listed
        if rule(entry, layer)
    ]


def kept_names(context: FileContext, rule: Rule, patterns: bool = False) -> list[str]:
    """Names of unquantized linears, without those that would take packed layers with them.

    A linear inside a Sequential is listed under the name of that, too, since runtimes differ in
    which they call it by. What is left out are linears outside of blocks (FLUX's proj_out), which
    runtimes build unquantized in any case; where the runtime reads file name patterns, they are
    listed as one: [p]roj_out is proj_out to it, and part of no name.
    """
    packed = tuple(context.layers)
    found = []
    for name in context.kept:
        parent, _, leaf = name.rpartition(".")
        if not _takes(name, packed, rule):
            found.append(name)
        elif patterns:
            found.append(f"[{name[0]}]{name[1:]}")
        if parent and leaf.isdigit() and not _takes(parent, packed, rule):
            found.append(parent)
    return list(dict.fromkeys(found))


def _takes(entry: str, packed: Iterable[str], rule: Rule) -> bool:
    return any(rule(entry, layer) for layer in packed)
