"""GGUF files that are broken, hostile, or merely unlike ours: refused with a reason, or read."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dqconvert.formats import gguf_header
from dqconvert.formats.gguf_source import GGUFSource
from dqconvert.formats.source import open_source
from dqconvert.quantizers.errors import SourceError
from dqconvert.quantizers.spec import TensorInfo


def string(name: str) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode()


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return string(name) + dims + struct.pack("<IQ", kind, offset)


def file_of(
    tensors: tuple[bytes, ...] = (), keys: tuple[bytes, ...] = (), version: int = 3, data: int = 0
) -> bytes:
    start = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys))
    start += b"".join(keys) + b"".join(tensors)
    return start + bytes(-len(start) % 32) + bytes(data)


def key(name: str, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def nested(depth: int) -> bytes:
    return key("k", 9, struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQB", 0, 1, 7))


BROKEN = {
    "empty": (b"", "not a GGUF file"),
    "other": (b"GGML" + bytes(60), "not a GGUF file"),
    "version 1": (file_of(version=1), "is GGUF version 1; versions 2 and 3"),
    "version 4": (file_of(version=4), "is GGUF version 4"),
    "big-endian": (file_of(version=3 << 24), "is big-endian"),
    "tensor count": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 63, 0), "promises 9223372036854775808"),
    "few tensors": (b"GGUF" + struct.pack("<IQQ", 3, 5, 0), "broken, or cut off, at byte 24"),
    "key count": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 40), "and 1099511627776 keys"),
    "name length": (file_of(keys=(struct.pack("<Q", 1 << 62),)), "broken, or cut off"),
    "no UTF-8": (file_of(keys=(struct.pack("<Q", 2) + b"\xff\xff",), data=9), "no text at byte 32"),
    "value type": (file_of(keys=(key("k", 13, b""),)), "key k is of an unknown type"),
    "array type": (file_of(keys=(key("k", 9, struct.pack("<IQ", 99, 1)),)), "key k is of an"),
    "array length": (file_of(keys=(key("k", 9, struct.pack("<IQ", 0, 1 << 60)),)), "key k holds"),
    "array cut off": (file_of(keys=(key("k", 9, struct.pack("<IQ", 10, 9999)),)), "cut off"),
    "array depth": (file_of(keys=(nested(100),)), "key k holds too many values, or too deep"),
    "two keys": (file_of(keys=(key("k", 0, b"\0"), key("k", 0, b"\0"))), "has the key k twice"),
    "alignment": (file_of(keys=(key("general.alignment", 4, b"\x30\0\0\0"),)), "not a power"),
    "no alignment": (file_of(keys=(key("general.alignment", 8, string("32")),)), "not a power"),
    "split": (file_of(keys=(key("split.count", 2, b"\x03\0"),)), "one of 3 parts of a split file"),
    "two tensors": (file_of((tensor("t", (8,)), tensor("t", (8,))), data=64), "tensor t twice"),
    "rank": (file_of((string("t") + b"\xff" * 4,)), "tensor t has 4294967295 dimensions"),
    "Q8_K": (file_of((tensor("t", (256,), 15),), data=999), "tensor t: is of type Q8_K, which"),
    "NVFP4": (file_of((tensor("t", (256,), 40),), data=999), "tensor t: is of type NVFP4"),
    "Q1_0": (file_of((tensor("t", (256,), 41),), data=999), "tensor t: is of type Q1_0"),
    "type": (file_of((tensor("t", (256,), 1000),), data=999), "tensor t: is of type number 1000"),
    "blocks": (file_of((tensor("t", (256, 100), 12),), data=999), "tensor t: Q4_K blocks do not"),
    "scalar block": (file_of((tensor("t", (), 8),), data=999), "tensor t: Q8_0 blocks do not"),
    "shape": (file_of((tensor("t", (1 << 63, 1 << 63)),), data=99), "tensor t: impossible shape"),
    "empty shape": (file_of((tensor("t", (0, 1 << 63)),), data=99), "tensor t: impossible shape"),
    "overlap": (file_of((tensor("t", (9,)), tensor("u", (8,), 0, 32)), data=99), "u overlaps"),
    "offset": (file_of((tensor("t", (8,), 0, 1 << 63),), data=99), "cut off; tensor t ends"),
    "cut off": (file_of((tensor("t", (8,)),), data=31), "cut off; tensor t ends at byte 96"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused(name: str, tmp_path: Path) -> None:
    content, why = BROKEN[name]
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"a\.gguf: ") as caught:
        open_source(path)
    assert why in str(caught.value)


@pytest.mark.parametrize("version", [2, 3])
def test_sound_files_of_others(version: int, tmp_path: Path) -> None:
    """Holes, any order, a scalar of rank 0, arrays within arrays, no padding at the end."""
    entries = (tensor("t", (8,), 0, 96), tensor("u", (2, 32), 8), tensor("s", (), 26, 128))
    keys = (nested(2), key("x", 10, b"\1" + bytes(7)), key("split.count", 2, b"\1\0"))
    path = tmp_path / "a.gguf"
    path.write_bytes(file_of(entries, keys, version, 132))
    source = GGUFSource((path,))
    assert source.metadata == {"k": [[[7]]], "x": 1, "split.count": 1}
    assert source.infos["u"] == TensorInfo("Q8_0", (2, 32))
    assert source.read("u").shape == (2, 34) and source.read("s").shape == ()


def sample() -> bytes:
    infos = {"a": TensorInfo("Q4_K", (2, 256)), "b": TensorInfo("F32", (3, 2))}
    metadata = {"s": "text", "n": 7, "l": [1.0, 2.0], "t": ["a", "b"]}
    start, head = gguf_header.encode(infos, metadata)
    return start + bytes(head.size - len(start))


@pytest.mark.parametrize("length", range(0, len(sample()), 7))
def test_cut_off_anywhere(length: int, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(sample()[:length])
    needed = len(sample()) - 32 + 24
    if length < needed:
        with pytest.raises(SourceError, match=r"a\.gguf: "):
            open_source(path)


@settings(
    derandomize=True,
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    place=st.integers(0, len(sample()) - 1),
    change=st.binary(min_size=1, max_size=8),
)
def test_damage_is_an_error_or_a_sound_header(place: int, change: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    content = bytearray(sample())
    content[place : place + len(change)] = change
    path.write_bytes(content)
    try:
        head = gguf_header.read(path)
    except SourceError:
        return
    for extent in head.extents.values():
        assert extent.offset + extent.info.nbytes <= len(content)
        assert math.prod(extent.info.stored.shape) <= len(content)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        open_source(tmp_path / "a.gguf")
    with pytest.raises(SourceError, match="No such file"):
        gguf_header.read(tmp_path / "a.gguf")
