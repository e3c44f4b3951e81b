"""The manifest beside a quantized file, read back: what it says, or one error that says where.

Anybody may have edited it, so nothing in it is taken on trust. What is left out is None or empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dqconvert.converter.families import sources
from dqconvert.converter.lora.apply import Recorded, recorded
from dqconvert.converter.resolve import read_json
from dqconvert.quantizers.errors import SourceError
from dqconvert.quantizers.schemes import schemes


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a manifest says that is needed again.

    dialect: the naming of the source; component: what it is of the pipeline; calibration: the key
    of its statistics; errors: weight errors by layer; schemes: by layer; settings: what was said
    of the target alone; files: SHA-256 by file name; loras: what was merged;
    dequantized: canonical linears that were packed in the file that this was transcoded from.
    """

    scheme: str | None = None
    dialect: str = "diffusers"
    component: str = "transformer"
    keep: str | None = None
    rounding: str | None = None
    calibration: str | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    schemes: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    loras: tuple[Recorded, ...] = ()
    dequantized: frozenset[str] = frozenset()


def read_manifest(path: Path) -> Manifest:
    """Read a manifest; an absent one says nothing. Raises SourceError on what is none of ours."""
    if not path.exists():
        return Manifest()
    try:
        said = read_json(path)
        rows = [_fields(row, f"layers[{i}]") for i, row in enumerate(_of(said, "layers", list, []))]
        errors = {
            _of(row, "name", str): _of(row, "weight_error", int | float | None) for row in rows
        }
        own = {_of(row, "name", str): _of(row, "scheme", str | None, None) for row in rows}
        files, options = _part(said, "files"), _part(said, "options")
        settings = _fields(options.get("settings", {}), "options.settings")
        dialect = _of(_part(said, "source"), "dialect", str, "diffusers")
        if dialect not in sources():
            raise _Wrong(f"source.dialect is {dialect[:40]!r}; known: {', '.join(sources())}")
        return Manifest(
            scheme=_of(said, "scheme", str | None, None),
            dialect=dialect,
            component=_of(_part(said, "source"), "component", str, "transformer"),
            keep=_of(options, "keep", str | None, None),
            rounding=_of(options, "rounding", str | None, None),
            calibration=_of(_part(said, "calibration"), "key", str | None, None),
            errors={name: error for name, error in errors.items() if error is not None},
            schemes={name: scheme for name, scheme in own.items() if scheme in schemes()},
            settings={name: _of(settings, name, str) for name in settings},
            files={name: _of(_fields(files[name], name), "sha256", str) for name in files},
            loras=tuple(map(_lora, _of(said, "loras", list, []))),
            dequantized=frozenset(
                map(str, _of(_part(said, "transcoded"), "dequantized", list, []))
            ),
        )
    except _Wrong as error:
        raise SourceError(
            f"{path}: {error}; restore the manifest, or remove it to go without"
        ) from error


class _Wrong(ValueError):
    """An entry that is not what we write."""


_NEEDED = object()


def _of(fields: Mapping[str, Any], key: str, kind: Any, default: Any = _NEEDED) -> Any:
    value = fields.get(key, default)
    if value is _NEEDED:
        raise _Wrong(f"{key} is missing")
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _Wrong(f"{key} is {str(value)[:40]!r}, which is not what we write")
    return value


def _lora(row: Any) -> Recorded:
    try:
        return recorded(_fields(row, "loras"))
    except (KeyError, TypeError, ValueError) as error:
        raise _Wrong(f"loras holds {str(row)[:40]!r}, which is not what we write") from error


def _fields(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _Wrong(f"{where} is {str(value)[:40]!r}, not an object")
    return value


def _part(said: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object of the manifest. We write null for a calibration that there was not."""
    if key == "calibration" and said.get(key) is None:
        return {}
    return _fields(said.get(key, {}), key)
