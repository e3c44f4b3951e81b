"""The safetensors container: where each byte is, before any is read or written. Torch-free.

    offset 0     u64 little-endian  N, bytes in the header
    offset 8     N bytes            JSON {name: {dtype, shape, data_offsets}, __metadata__}
    offset 8+N   the buffer         tensors back to back, without holes

Files of ours pad the header with spaces so that the buffer begins at a multiple of 64, and put
tensors whose size is a multiple of 64 first, in the order of the plan; the others follow by
falling element size. So every tensor is aligned to its elements, and every large one to a cache
line (runtimes that map the file read int8 weights with aligned vector loads).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqconvert.quantizers.errors import SourceError
from dqconvert.quantizers.spec import DTYPE_BITS, TensorInfo

ALIGNMENT = 64
MAX_HEADER = 100_000_000
"""Longest header that the safetensors library accepts."""
_UNREADABLE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,  # an extent of 1e400
    RecursionError,
)


@dataclass(frozen=True, slots=True)
class Extent:
    """A tensor and where its bytes begin, counted from the start of the file."""

    info: TensorInfo
    offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """A whole header: extents by name in file order, metadata, and the size of the file.

    metadata: strings; in GGUF also booleans, numbers, and lists.
    """

    extents: Mapping[str, Extent]
    metadata: Mapping[str, Any]
    size: int


def layout(infos: Mapping[str, TensorInfo]) -> list[str]:
    """Names in the order in which their bytes are laid down."""
    even = [name for name, info in infos.items() if info.nbytes % ALIGNMENT == 0]
    odd = [name for name, info in infos.items() if info.nbytes % ALIGNMENT != 0]
    return even + sorted(odd, key=lambda name: -DTYPE_BITS[infos[name].dtype])


def encode(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, Header]:
    """The first bytes of a file that will hold these tensors, and where each of them goes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    begins: dict[str, int] = {}
    for name in layout(infos):
        info = infos[name]
        begins[name] = offset
        entries[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    base = 8 + len(text)
    extents = {name: Extent(infos[name], base + begin) for name, begin in begins.items()}
    return struct.pack("<Q", len(text)) + text, Header(extents, dict(metadata), base + offset)


def read(path: Path) -> Header:
    """Parse and check a file's header.

    Raises SourceError where the file is missing, cut off, not safetensors, or where its header
    contradicts itself.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            text = file.read(length) if 0 < length <= min(size - 8, MAX_HEADER) else b""
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}") from error
    if not text:
        raise SourceError(
            f"{path}: not a safetensors file, or cut off inside its header ({size} bytes); "
            "download it again"
        )
    try:
        entries = json.loads(text)
        metadata = {str(k): str(v) for k, v in (entries.pop("__metadata__", None) or {}).items()}
        extents = {name: _extent(entry, 8 + length) for name, entry in entries.items()}
    except _UNREADABLE as error:
        raise SourceError(f"{path}: its safetensors header cannot be read ({error})") from error
    _check(path, extents, 8 + length, size)
    return Header(extents, metadata, size)


def _extent(entry: Mapping[str, Any], base: int) -> Extent:
    info = TensorInfo(str(entry["dtype"]), tuple(int(extent) for extent in entry["shape"]))
    begin, end = entry["data_offsets"]
    if info.dtype not in DTYPE_BITS:
        raise ValueError(f"unknown dtype {info.dtype}")
    if any(extent < 0 for extent in info.shape):
        raise ValueError(f"negative shape {list(info.shape)}")
    if end - begin != info.nbytes:
        raise ValueError(f"{end - begin} bytes for {info.dtype} {list(info.shape)}")
    return Extent(info, base + begin)


def _check(path: Path, extents: Mapping[str, Extent], base: int, size: int) -> None:
    """Tensors must follow each other without holes up to the end of the file."""
    end = base
    in_order = sorted(extents.items(), key=lambda item: (item[1].offset, item[1].info.nbytes))
    for name, extent in in_order:
        if extent.offset != end:
            raise SourceError(f"{path}: tensor {name} overlaps another or leaves a hole")
        end += extent.info.nbytes
    if end != size:
        what = "cut off" if end > size else "too long"
        raise SourceError(
            f"{path}: {what}; its header promises {end} bytes, the file has {size}; "
            "download it again"
        )
