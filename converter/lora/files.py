"""LoRA files by their headers, and what they say of alpha. Torch-free until a tensor is read."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dqconvert.converter.resolve import read_json
from dqconvert.formats.source import Source, open_source
from dqconvert.quantizers.adapters import scale_of
from dqconvert.quantizers.errors import DQConvertError, SourceError
from dqconvert.quantizers.spec import FLOAT_DTYPES

CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"
"""Where PEFT, and where diffusers, keeps the config of the adapters."""

SMALL = ("F8_E4M3", "F8_E5M2")
"""What LoRAs are cast to beside 16 and 32 bit."""

INTEGERS = ("I32", "I64", "I16", "U8", "I8")
"""What an alpha may be besides a float."""


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """A LoRA asked for: its file, or a folder that holds one, and its strength."""

    path: Path
    strength: float = 1.0


@dataclass(frozen=True, eq=False)
class LoraFile:
    """An open LoRA file. said: PEFT's config of it, {} without one."""

    spec: LoraSpec
    source: Source
    said: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The file itself."""
        return self.source.files[0]

    @property
    def name(self) -> str:
        """For people."""
        return self.path.name

    @cached_property
    def sha256(self) -> str:
        """The file's hash, in hexadecimal."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def identity(self) -> tuple[str, int, int, float]:
        """What tells it from others without reading it: name, size, time, strength."""
        found = self.path.stat()
        return self.name, found.st_size, found.st_mtime_ns, self.spec.strength

    def scale(self, module: str, rank: int | None, alpha: str | None) -> float:
        """What a module's product is multiplied by. alpha: the tensor that says it, or None."""
        if alpha is not None:
            found = float(self.source.read(alpha).float().reshape(-1)[0])
            if not math.isfinite(found):
                raise SourceError(f"{self.path}: tensor {alpha} is {found}, which is no alpha")
            return scale_of(rank, found)
        if self.said.get("peft_type") == "LOKR":  # whose whole matrices are scaled as well
            whole = self._pattern(module, "rank_pattern", "r")
            rank = None if whole is None else int(whole)
        said = self._pattern(module, "alpha_pattern", "lora_alpha", "alpha")
        return scale_of(rank, said, bool(self.said.get("use_rslora")))

    def _pattern(self, module: str, patterns: str, *names: str) -> float | None:
        """What the config says of a module, by PEFT's rule: the first pattern that ends its name,
        else what it says of all; None where it says nothing."""
        for pattern, value in (self.said.get(patterns) or {}).items():
            if re.match(rf"(?:.*\.)?(?:{pattern})$", module):
                return float(value)
        found = next((self.said[name] for name in names if name in self.said), None)
        return None if found is None else float(found)


def opened(spec: LoraSpec) -> LoraFile:
    """Open a LoRA. Raises SourceError where there is none, or where it is of whole numbers."""
    source = open_source(spec.path)
    odd = [
        name
        for name, info in source.infos.items()
        if info.dtype not in (*FLOAT_DTYPES, *SMALL)
        and not (info.shape in ((), (1,)) and _whole(info.dtype))
    ]
    if odd:
        raise SourceError(
            f"{spec.path}: {odd[0]} is {source.infos[odd[0]].dtype}; a LoRA holds floating point"
        )
    return LoraFile(spec, source, _said(source))


def _whole(dtype: str) -> bool:
    return dtype in INTEGERS


def _said(source: Source) -> Mapping[str, Any]:
    """PEFT's config: from the header, or from the file beside."""
    header = source.metadata.get(METADATA)
    try:
        if header is not None:
            found = _own(json.loads(header))
            _check(found)
            return found
        if "lora_alpha" in source.metadata:
            return {"lora_alpha": float(source.metadata["lora_alpha"])}
        beside = source.files[0].parent / CONFIG
        found = read_json(beside) if beside.exists() else {}
        _check(found)
    except (DQConvertError, ValueError, TypeError, AttributeError, re.error) as error:
        raise SourceError(f"{source.files[0]}: its config says no alpha ({error})") from error
    return found


def _check(said: Mapping[str, Any]) -> None:
    """What is read of a config must be numbers, and expressions for names."""
    for key in ("alpha_pattern", "rank_pattern"):
        for pattern, value in (said.get(key) or {}).items():
            re.compile(pattern)
            float(value)
    for key in ("lora_alpha", "alpha", "r"):
        float(said.get(key) or 1)


def _own(said: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' metadata without the component's name before each key."""
    found: dict[str, Any] = {}
    for key, value in said.items():
        component, _, name = key.rpartition(".")
        if component.startswith("text_encoder"):
            continue
        found[name] = value
    return found
