"""The GGUF container, version 3: where each byte is, before any is read or written. Torch-free.

    offset 0   "GGUF", u32 version, u64 number of tensors T, u64 number of keys M
    M times    string key, u32 type, value; an array: u32 type of its elements, u64 count, elements
    T times    string name, u32 rank, u64 extents (the innermost first), u32 type, u64 offset
    zeros      up to a multiple of the alignment (general.alignment, 32 without that key)
    the buffer tensors at their offsets from here, each followed by zeros up to the next multiple

Little-endian throughout; a string is a u64 number of bytes and UTF-8 (ggml's docs/gguf.md).
Infos and extents here are in torch's order, the outermost first.

Written files keep to what every reader takes: tensors lie in the order of their names without
holes, and the last one is padded too (gguf.cpp refuses others). A scalar is written as [1]:
gguf-py and ggml read a rank of 0, but gguf-py fails on a BF16 one and ComfyUI-GGUF on any. gguf.cpp
takes names up to 63 bytes and ranks up to 4. stable-diffusion.cpp then falls back to a reader of
its own, which takes both, but loses its way in a file that has an array among its keys.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from dqconvert.formats.header import Extent, Header
from dqconvert.quantizers.errors import SourceError
from dqconvert.quantizers.spec import BLOCKS, TensorInfo

MAGIC, VERSION = b"GGUF", 3
ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10,
    "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18,
    "IQ1_S": 19, "IQ4_NL": 20, "IQ3_S": 21, "IQ2_S": 22, "IQ4_XS": 23, "I8": 24, "I16": 25,
    "I32": 26, "I64": 27, "F64": 28, "IQ1_M": 29, "BF16": 30, "TQ1_0": 34, "TQ2_0": 35,
    "MXFP4": 39,
}  # fmt: skip
"""ggml's number of each dtype that a file may have (ggml.h, ggml_type)."""

_DTYPES = {number: dtype for dtype, number in TYPES.items()}
_FOREIGN = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
    36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 40: "NVFP4", 41: "Q1_0", 42: "Q2_0",
}  # fmt: skip
"""Types of ggml's that are not read here: withdrawn, or never of weights for these runtimes."""

_U32, _I32, _F32, _BOOL, _STRING, _ARRAY, _U64, _I64 = 4, 5, 6, 7, 8, 9, 10, 11
_SCALARS = dict(
    zip((0, 1, 2, 3, _U32, _I32, _F32, _BOOL, _U64, _I64, 12), "BbHhIif?Qqd", strict=True)
)
"""struct's letter for each type of value (gguf.h, gguf_type)."""

MAX_HEADER = 100_000_000
MAX_COUNT = 1 << 18
MAX_ELEMENTS = 1 << 22
MAX_RANK = 64
MAX_DEPTH = 4
"""Bytes of a header, its tensors and its keys, elements of all its arrays, extents of a tensor,
and arrays within arrays: beyond what any model has, and read within 1 GB of memory."""


# --------------------------------------------------------------------------------- writing


def encode(infos: Mapping[str, TensorInfo], metadata: Mapping[str, Any]) -> tuple[bytes, Header]:
    """The first bytes of a file that will hold these tensors, and where each of them goes.

    metadata: strings, booleans, integers (u32 where that holds them, else u64 or i64), floats
    (f32), and lists of one of these (integers i32, or i64 where one needs it). Raises ValueError
    where GGUF cannot hold a tensor or a value.
    """
    alignment = _aligned_to(metadata)
    keys = b"".join(_string(key) + _value(key, value) for key, value in metadata.items())
    entries, begins, size = [], {}, 0
    for name, info in infos.items():
        begins[name] = size
        entries.append(_entry(name, info, size))
        size += -(-info.nbytes // alignment) * alignment
    start = (
        MAGIC + struct.pack("<IQQ", VERSION, len(infos), len(metadata)) + keys + b"".join(entries)
    )
    start += bytes(-len(start) % alignment)
    extents = {name: Extent(infos[name], len(start) + begin) for name, begin in begins.items()}
    return start, Header(extents, dict(metadata), len(start) + size)


def _entry(name: str, info: TensorInfo, offset: int) -> bytes:
    if info.dtype not in TYPES:
        raise ValueError(f"{name}: GGUF has no type for {info.dtype}")
    shape = info.shape or (1,)
    if info.dtype in BLOCKS and shape[-1] % BLOCKS[info.dtype][0]:
        raise ValueError(f"{name}: {info.dtype} blocks do not divide {list(info.shape)}")
    extents = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return _string(name) + extents + struct.pack("<IQ", TYPES[info.dtype], offset)


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(key: str, value: Any) -> bytes:
    """A value's type and bytes."""
    if not isinstance(value, (list, tuple)):
        kind = _kind(key, value)
        return struct.pack("<I", kind) + _scalar(kind, value)
    kinds = {_kind(key, element) for element in value} or {_STRING}
    if kinds <= {_U32, _I64, _U64}:
        small = all(-(1 << 31) <= element < 1 << 31 for element in value)
        kinds = {_I32 if small else _I64}
    if len(kinds) > 1:
        raise ValueError(f"{key}: a list of values of several types")
    kind = kinds.pop()
    elements = b"".join(_scalar(kind, element) for element in value)
    return struct.pack("<IIQ", _ARRAY, kind, len(value)) + elements


def _kind(key: str, value: Any) -> int:
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, str):
        return _STRING
    if isinstance(value, float):
        return _F32
    if isinstance(value, int) and -(1 << 63) <= value < 1 << 64:
        return _I64 if value < 0 else _U32 if value < 1 << 32 else _U64
    raise ValueError(f"{key}: GGUF has no type for {value!r}")


def _scalar(kind: int, value: Any) -> bytes:
    return _string(value) if kind == _STRING else struct.pack("<" + _SCALARS[kind], value)


def _aligned_to(metadata: Mapping[str, Any]) -> int:
    """What tensors are aligned to; ValueError where the metadata ask for something impossible."""
    alignment = metadata.get(ALIGNMENT_KEY, ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"{ALIGNMENT_KEY} is {alignment!r}, not a power of two")
    return alignment


# --------------------------------------------------------------------------------- reading


class Cursor:
    """The little-endian values of a file one after another.

    limit: how far they may reach, in bytes; SourceError where they go further.
    """

    def __init__(self, path: Path, file: IO[bytes], limit: int) -> None:
        self.path, self.at = path, 0
        self._file, self._limit = file, limit

    def take(self, count: int) -> bytes:
        """The next bytes."""
        data = self._file.read(count) if count <= self._limit - self.at else b""
        if len(data) != count:
            raise SourceError(
                f"{self.path}: broken, or cut off, at byte {self.at}; download it again"
            )
        self.at += count
        return data

    def numbers(self, letters: str) -> tuple[Any, ...]:
        """The next values, by struct's letters."""
        return struct.unpack("<" + letters, self.take(struct.calcsize("<" + letters)))

    def text(self, length: str = "Q") -> str:
        """The next string. length: struct's letter for what stands before it."""
        (count,) = self.numbers(length)
        at = self.at
        try:
            return self.take(max(count, 0)).decode()
        except UnicodeDecodeError as error:
            raise SourceError(f"{self.path}: no text at byte {at}; download it again") from error


def read(path: Path) -> Header:
    """Parse and check a file's header, of version 2 or 3.

    Raises SourceError where the file is missing, cut off, no GGUF, a part of a split one, holds
    types that are not of BLOCKS, or where its header contradicts itself.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _Reading(path, Cursor(path, file, min(size, MAX_HEADER)), size).header()
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}") from error


class _Reading:
    """One file's header while it is parsed."""

    def __init__(self, path: Path, cursor: Cursor, size: int) -> None:
        self._path, self._cursor, self._size = path, cursor, size
        self._elements = 0

    def header(self) -> Header:
        tensors, keys = self._counts()
        metadata = self._metadata(keys)
        parts = metadata.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise self._refused(
                f"is one of {parts} parts of a split file; merge them (llama-gguf-split --merge)"
            )
        try:
            alignment = _aligned_to(metadata)
        except ValueError as error:
            raise self._refused(str(error)) from error
        entries = self._entries(tensors)
        base = -(-self._cursor.at // alignment) * alignment
        extents = {name: Extent(info, base + at) for name, (info, at) in entries.items()}
        self._check(extents)
        return Header(extents, metadata, self._size)

    def _refused(self, why: str) -> SourceError:
        return SourceError(f"{self._path}: {why}")

    def _counts(self) -> tuple[int, int]:
        """How many tensors and keys there are."""
        if self._size < 24 or self._cursor.take(4) != MAGIC:
            raise self._refused(f"not a GGUF file, or cut off ({self._size} bytes)")
        (version,) = self._cursor.numbers("I")
        if version and not version & 0xFFFF:
            raise self._refused("is big-endian; these runtimes read little-endian GGUF")
        if version not in (2, VERSION):
            raise self._refused(f"is GGUF version {version}; versions 2 and 3 can be read")
        tensors, keys = self._cursor.numbers("QQ")
        if max(tensors, keys) > MAX_COUNT:
            raise self._refused(f"its header promises {tensors} tensors and {keys} keys")
        return tensors, keys

    def _metadata(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self._cursor.text()
            if key in found:
                raise self._refused(f"has the key {key} twice")
            (kind,) = self._cursor.numbers("I")
            found[key] = self._value(key, kind, 0)
        return found

    def _value(self, key: str, kind: int, depth: int) -> Any:
        if kind == _STRING:
            return self._cursor.text()
        if kind in _SCALARS:
            return self._cursor.numbers(_SCALARS[kind])[0]
        if kind != _ARRAY:
            raise self._refused(f"key {key} is of an unknown type ({kind})")
        kind, count = self._cursor.numbers("IQ")
        self._elements += count
        if self._elements > MAX_ELEMENTS or depth >= MAX_DEPTH:
            raise self._refused(f"key {key} holds too many values, or too deep ones")
        if kind in _SCALARS:
            return list(self._cursor.numbers(f"{count}{_SCALARS[kind]}"))
        return [self._value(key, kind, depth + 1) for _ in range(count)]

    def _entries(self, count: int) -> dict[str, tuple[TensorInfo, int]]:
        """What the file says of each tensor, and its offset in the buffer."""
        found: dict[str, tuple[TensorInfo, int]] = {}
        for _ in range(count):
            name = self._cursor.text()
            if name in found:
                raise self._refused(f"holds tensor {name} twice")
            (rank,) = self._cursor.numbers("I")
            if rank > MAX_RANK:
                raise self._refused(f"tensor {name} has {rank} dimensions")
            shape = self._cursor.numbers(f"{rank}Q")[::-1]
            kind, offset = self._cursor.numbers("IQ")
            found[name] = self._info(name, kind, shape), offset
        return found

    def _info(self, name: str, kind: int, shape: tuple[int, ...]) -> TensorInfo:
        if kind not in _DTYPES:
            what = _FOREIGN.get(kind, f"number {kind}")
            raise self._refused(f"tensor {name}: is of type {what}, which cannot be read")
        info = TensorInfo(_DTYPES[kind], shape)
        if math.prod(max(extent, 1) for extent in shape) >= 1 << 62:
            raise self._refused(f"tensor {name}: impossible shape {list(shape)}")
        if info.dtype in BLOCKS and (not shape or shape[-1] % BLOCKS[info.dtype][0]):
            raise self._refused(f"tensor {name}: {info.dtype} blocks do not divide {list(shape)}")
        return info

    def _check(self, extents: Mapping[str, Extent]) -> None:
        """Tensors must not overlap, nor go beyond the end of the file."""
        end, last = 0, ""
        in_order = sorted(extents.items(), key=lambda item: (item[1].offset, item[1].info.nbytes))
        for name, extent in in_order:
            if extent.offset < end:
                raise self._refused(f"tensor {name} overlaps tensor {last}")
            if extent.offset + extent.info.nbytes > self._size:
                raise self._refused(
                    f"cut off; tensor {name} ends at byte {extent.offset + extent.info.nbytes}, "
                    f"the file has {self._size}; download it again"
                )
            end, last = extent.offset + extent.info.nbytes, name
