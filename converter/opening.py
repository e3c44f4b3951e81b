"""A checkpoint as canonical weights, whatever it is: plain, in 8 bit, in blocks, or packed.

What one of our targets recognises is unpacked; other 8-bit files are read by the scales beside
their weights. Torch-free, but for files of torch and for folded models.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dqconvert.converter.canonical import CanonicalSource
from dqconvert.converter.dequantized import plain_weights
from dqconvert.converter.detect import open_canonical
from dqconvert.converter.reopen import NoFamily, reopen
from dqconvert.formats.comfy import ENTRIES
from dqconvert.formats.gguf_source import Decoded
from dqconvert.formats.scaled_source import Rescaled, has_bytes
from dqconvert.formats.source import Source, open_source
from dqconvert.formats.targets import Recognized, Target, nunchaku, recognize
from dqconvert.formats.unpacked_source import Unpacked
from dqconvert.formats.words import told
from dqconvert.quantizers.errors import SourceError

NAMED = 3
"""How many problems of a broken file an error names."""


def open_model(
    path: Path, config: Mapping[str, Any] | None = None, part: str = ""
) -> CanonicalSource:
    """The weights at a path, dequantized where they are not plain.

    config: the config.json beside it; part: only tensors that begin with it are looked at. Raises
    SourceError where nothing known is there, or what is there is broken.
    """
    found = _opened(path, config or {}, part)
    for name, info in found.infos.items():
        linear = name.endswith(".weight") and found.family.linear(name.removesuffix(".weight"))
        if linear and (len(info.shape) < 2 or not info.numel):
            raise SourceError(f"{found.where(name)}: found {list(info.shape)}, needed a matrix")
    return found


def _opened(path: Path, config: Mapping[str, Any], part: str) -> CanonicalSource:
    try:
        source = open_source(path)
    except SourceError as error:
        return _in_parts(path, error)
    known = None
    if not isinstance(source, Decoded) and not part:
        known = recognize(source.infos, told(source), config)
    if known is not None:
        return _quantized(path, source, known, config)
    try:
        return open_canonical(_widened(source), path, part, config)
    except SourceError as error:
        said = config.get("quantization_config")
        if not isinstance(said, Mapping):
            raise
        raise SourceError(f"{error}; config.json calls it quantized ({_method(said)})") from error


def _method(said: Mapping[str, Any]) -> str:
    """What a quantization_config calls itself, in a few words."""
    found = (str(said[key]) for key in ("quant_method", "quant_algo", "format") if key in said)
    return ", ".join(found) or "quantization_config"


def _quantized(
    path: Path, source: Source, known: tuple[Target, Recognized], config: Mapping[str, Any]
) -> CanonicalSource:
    """A file that a target recognises, by the family's table of its names, or by them alone.

    Where the target finds it broken, 8-bit weights are still told by the scales beside them.
    """
    try:
        return _reopened(path)
    except SourceError as error:
        said = error
    for other in (_unpacked(source, known), _by_scales(source)):
        try:
            if other is not None:
                return open_canonical(other, path, "", config)
        except SourceError as error:
            said = error if isinstance(said, NoFamily) else said
    raise said


def _reopened(path: Path) -> CanonicalSource:
    found = reopen(path)
    problems = found.unreadable()
    if problems:
        more = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise SourceError(
            f"{path}: quantized for {found.target.NAME}, but broken: "
            f"{'; '.join(problems[:NAMED])}{more}"
        )
    return plain_weights(found)


def _in_parts(path: Path, error: SourceError) -> CanonicalSource:
    """A quantized model in several files, one for each block; the error where it is none."""
    try:
        found = reopen(path)
    except SourceError:
        raise error from None
    if len(found.source.files) == 1:
        raise error
    return _reopened(path)


def _unpacked(source: Source, known: tuple[Target, Recognized]) -> Unpacked | None:
    """The file under its own names, where its layers can be undone without knowing the family."""
    target, found = known
    if target.NAME == nunchaku.NAME or set(found.problems) - set(found.loading):
        return None
    return Unpacked(source, target.unpack, found.forms, found.extras)


def _by_scales(source: Source) -> Rescaled | None:
    """The file by the scales beside its weights, unless something says more of them."""
    marked = any(name.endswith(".comfy_quant") for name in source.infos)
    if marked or ENTRIES in source.metadata or not has_bytes(source):
        return None
    return Rescaled(source)


def _widened(source: Source) -> Source:
    return Rescaled(source) if has_bytes(source) else source
