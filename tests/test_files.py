"""safetensors files: their bytes, the library's opinion of them, what is refused."""

from __future__ import annotations

import json
import os
import runpy
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from dqconvert.formats import header
from dqconvert.formats.source import open_source
from dqconvert.quantizers.errors import SourceError
from dqconvert.quantizers.spec import DTYPE_BITS, TensorInfo

containers = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("containers.py"))))
filled, infos_of, same = containers.filled, containers.infos_of, containers.same
write = containers.write
lawful = settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
Infos = dict[str, TensorInfo]

infos_any = st.dictionaries(
    st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
    st.builds(
        TensorInfo,
        st.sampled_from(sorted(DTYPE_BITS)),
        st.lists(st.integers(0, 9) | st.sampled_from([32, 64]), max_size=3).map(tuple),
    ),
    max_size=6,
)


# ------------------------------------------------------------------------------ the header

GOLDEN = (
    b'\xf8\x00\x00\x00\x00\x00\x00\x00{"__metadata__":{"format":"pt"},'
    b'"even":{"dtype":"U8","shape":[64],"data_offsets":[0,64]},'
    b'"wide":{"dtype":"F32","shape":[],"data_offsets":[64,68]},'
    b'"odd":{"dtype":"U8","shape":[3],"data_offsets":[68,71]}}'
)


def test_the_bytes_of_a_tiny_file(tmp_path: Path) -> None:
    """Multiples of 64 first, then by falling element size; spaces up to a multiple of 64."""
    tensors = {
        "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "wide": torch.tensor(1.0),
        "even": torch.arange(64, dtype=torch.uint8),
    }
    start, head = header.encode(infos_of(tensors), {"format": "pt"})
    assert start == GOLDEN + b" " * (256 - 210)
    assert head.size == 256 + 71
    assert {name: extent.offset for name, extent in head.extents.items()} == {
        "even": 256,
        "wide": 320,
        "odd": 324,
    }
    path = tmp_path / "a.safetensors"
    write(path, tensors, {"format": "pt"})
    buffer = bytes(range(64)) + b"\x00\x00\x80\x3f" + b"\x01\x02\x03"
    assert path.read_bytes() == start + buffer


@lawful
@given(infos=infos_any, metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5)))
def test_every_tensor_is_aligned(infos: Infos, metadata: dict[str, str]) -> None:
    start, head = header.encode(infos, metadata)
    assert len(start) % header.ALIGNMENT == 0
    assert struct.unpack("<Q", start[:8])[0] == len(start) - 8
    assert head.extents.keys() == infos.keys()
    end, whole = len(start), True
    for name, extent in head.extents.items():
        assert extent.info == infos[name]
        assert extent.offset == end, "no holes"
        assert extent.offset % (DTYPE_BITS[extent.info.dtype] // 8) == 0
        multiple = extent.info.nbytes % header.ALIGNMENT == 0
        assert whole or not multiple, "multiples of 64 come first"
        assert not multiple or extent.offset % header.ALIGNMENT == 0
        whole, end = multiple, end + extent.info.nbytes
    assert head.size == end


@lawful
@given(infos=infos_any, metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5)))
def test_ours_are_read_by_the_library_and_by_us(
    infos: Infos, metadata: dict[str, str], tmp_path: Path
) -> None:
    path, tensors = tmp_path / "a.safetensors", filled(infos)
    write(path, tensors, metadata)
    theirs = load_file(path)
    assert theirs.keys() == tensors.keys()
    assert all(same(theirs[name], tensor) for name, tensor in tensors.items())
    source = open_source(path)
    assert dict(source.infos) == infos and dict(source.metadata) == metadata
    assert all(same(source.read(name), tensor) for name, tensor in tensors.items())
    with safetensors.safe_open(path, "pt") as file:
        assert (file.metadata() or {}) == metadata


@lawful
@given(infos=infos_any, metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5)))
def test_the_librarys_are_read_by_us(
    infos: Infos, metadata: dict[str, str], tmp_path: Path
) -> None:
    path, tensors = tmp_path / "a.safetensors", filled(infos)
    save_file(tensors, path, metadata or None)
    source = open_source(path)
    assert dict(source.infos) == infos and dict(source.metadata) == metadata
    for name, tensor in tensors.items():
        assert same(source.read(name), tensor)
        assert source.where(name) == path


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_rows_are_slices(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = filled({"x": TensorInfo(dtype, (7, 3, 2)), "y": TensorInfo(dtype, (5,))})
    write(path, tensors)
    source = open_source(path)
    for start in range(8):
        for stop in range(start, 8):
            assert same(source.read("x", (start, stop)), tensors["x"][start:stop])
    assert same(source.read("y", (1, 4)), tensors["y"][1:4])
    fresh = source.read("x")
    fresh.view(torch.uint8).zero_()
    assert same(source.read("x"), tensors["x"]), "memory of its own"


# ------------------------------------------------------------------------- what is refused


def refused(path: Path, match: str) -> None:
    """By us with the path in one line; and the library does not take it either."""
    with pytest.raises(SourceError, match=match) as caught:
        open_source(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises((safetensors.SafetensorError, OSError, ValueError)):
        load_file(path)


def test_cut_off_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path, filled({"a": TensorInfo("F32", (32,)), "b": TensorInfo("U8", (5,))}))
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    for size in (0, 1, 7, 8, 9, 8 + length - 1):
        path.write_bytes(content[:size])
        refused(path, r"not a safetensors file, or cut off inside its header \(\d+ bytes\)")
    for size in (8 + length, 8 + length + 1, 8 + length + 128, len(content) - 1):
        path.write_bytes(content[:size])
        refused(path, f"promises {len(content)} bytes, the file has {size}; download it again")
    path.write_bytes(content + b"\0")
    refused(path, f"promises {len(content)} bytes, the file has {len(content) + 1}")


def raw_file(path: Path, text: bytes, buffer: int) -> None:
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(buffer))


def entry(dtype: Any, shape: Any, *offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("entries", "buffer", "match"),
    [
        ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, 6, "b overlaps another"),
        ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 0, 4)}, 4, "overlaps another"),
        ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 8, 12)}, 12, "b .*leaves a hole"),
        ({"a": entry("U8", [4], 8, 12)}, 12, "a .*leaves a hole"),
        (
            {
                "a": entry("U8", [4], 0, 4),
                "none": entry("U8", [0], 9, 9),
                "b": entry("U8", [4], 9, 13),
            },
            13,
            "leaves a hole",
        ),
        ({"a": entry("U8", [4], 0, 5)}, 5, r"5 bytes for U8 \[4\]"),
        ({"a": entry("F32", [4], 0, 4)}, 4, r"4 bytes for F32 \[4\]"),
        ({"a": entry("F7", [4], 0, 4)}, 4, "unknown dtype F7"),
        ({"a": entry("U8", [-2, -2], 0, 4)}, 4, "cannot be read"),
        ({"a": entry("U8", [4], 0)}, 4, "cannot be read"),
        ({"a": {"dtype": "U8", "shape": [4]}}, 4, "cannot be read"),
        ({"a": entry("U8", [float("inf")], 0, 4)}, 4, "cannot be read"),
        ({"a": entry("U8", 4, 0, 4)}, 4, "cannot be read"),
        ({"a": 3}, 4, "cannot be read"),
        ({"__metadata__": [1]}, 0, "cannot be read"),
        ([], 0, "cannot be read"),
        (3, 0, "cannot be read"),
    ],
)
def test_headers_that_contradict_themselves(
    entries: Any, buffer: int, match: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    raw_file(path, json.dumps(entries).encode(), buffer)
    refused(path, match)


@pytest.mark.parametrize("text", [b"{", b"nonsense", b'{"a": \xff}', b"[" * 100_000])
def test_headers_that_are_no_json(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    raw_file(path, text, 0)
    refused(path, "its safetensors header cannot be read")


@pytest.mark.parametrize("length", [0, 1 << 20, 1 << 62, (1 << 64) - 1])
def test_headers_of_impossible_length(length: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" + bytes(100))
    refused(path, "not a safetensors file")


def test_files_of_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"PK")
    with pytest.raises(SourceError, match=r"no archive of torch\.save"):
        open_source(tmp_path / "a.ckpt")
    with pytest.raises(SourceError, match="no such file"):
        open_source(tmp_path / "none.safetensors")
    (tmp_path / "a.ckpt").unlink()
    with pytest.raises(SourceError, match=r"holds no \.safetensors file"):
        open_source(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path, filled({"a": TensorInfo("F32", (64,))}))
    source = open_source(path)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(SourceError, match=r"a\.safetensors: became shorter"):
        source.read("a")
    path.unlink()
    with pytest.raises(SourceError, match=r"a\.safetensors: No such file"):
        source.read("a")


# --------------------------------------------------------------------------------- shards


def shards(folder: Path, stem: str = "model", index: bool = True, total: int = 3) -> Infos:
    """A checkpoint of three shards, two tensors in each."""
    everything: dict[str, Tensor] = {}
    weight_map = {}
    for n in range(1, total + 1):
        name = f"{stem}-{n:05}-of-{total:05}.safetensors"
        part = filled({f"{n}.a": TensorInfo("F32", (4,)), f"{n}.b": TensorInfo("U8", (3,))}, n)
        save_file(part, folder / name)
        everything |= part
        weight_map |= dict.fromkeys(part, name)
    if index:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / f"{stem}.safetensors.index.json").write_text(text)
    return infos_of(everything)


@pytest.mark.parametrize("index", [True, False])
def test_a_set_of_shards_is_one_checkpoint(index: bool, tmp_path: Path) -> None:
    infos = shards(tmp_path, index=index)
    paths = [tmp_path, tmp_path / "model.safetensors.index.json"] if index else [tmp_path]
    for path in paths:
        source = open_source(path)
        assert dict(source.infos) == infos
        assert [file.name for file in source.files] == [
            f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)
        ]
        assert source.where("2.a").name == "model-00002-of-00003.safetensors"
        want = filled({"2.a": TensorInfo("F32", (4,))}, 2)["2.a"]
        assert same(source.read("2.a"), want)


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("lost", [1, 2, 3])
def test_a_missing_shard_is_named(index: bool, lost: int, tmp_path: Path) -> None:
    shards(tmp_path, index=index)
    name = f"model-0000{lost}-of-00003.safetensors"
    (tmp_path / name).unlink()
    with pytest.raises(SourceError, match=f"missing shard {name}; download it again"):
        open_source(tmp_path)


def test_a_cut_off_shard_is_named(tmp_path: Path) -> None:
    shards(tmp_path)
    path = tmp_path / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SourceError, match=r"model-00002-of-00003\.safetensors: cut off"):
        open_source(tmp_path)


def one_file(folder: Path, name: str) -> None:
    save_file({name: torch.ones(2)}, folder / f"{name}.safetensors")


@pytest.mark.parametrize(
    "second",
    [
        lambda folder: one_file(folder, "other"),
        lambda folder: shards(folder, "other", index=False),
        lambda folder: shards(folder, "model", index=False, total=2),
    ],
    ids=["file", "shards", "same name, other number"],
)
def test_two_checkpoints_in_one_folder(second: Callable[[Path], object], tmp_path: Path) -> None:
    shards(tmp_path, index=False)
    second(tmp_path)
    with pytest.raises(SourceError, match=r"holds several checkpoints .*; name one of them"):
        open_source(tmp_path)


def test_two_files_or_two_indexes_in_one_folder(tmp_path: Path) -> None:
    one_file(tmp_path, "one")
    assert list(open_source(tmp_path).infos) == ["one"]
    one_file(tmp_path, "two")
    with pytest.raises(SourceError, match=r"one\.safetensors, two\.safetensors"):
        open_source(tmp_path)
    other = tmp_path / "indexed"
    other.mkdir()
    shards(other, "a")
    shards(other, "b")
    with pytest.raises(SourceError, match="several checkpoints"):
        open_source(other)


def test_one_tensor_in_two_shards(tmp_path: Path) -> None:
    shards(tmp_path, index=False)
    again = filled({"1.a": TensorInfo("F32", (4,))})
    save_file(again, tmp_path / "model-00003-of-00003.safetensors")
    with pytest.raises(SourceError, match=r"tensor 1\.a is also in .*model-00001"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '"x"']
)
def test_a_broken_index(text: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(SourceError, match="not a safetensors index") as caught:
        open_source(path)
    assert str(path) in str(caught.value)


def test_an_index_that_promises_too_much(tmp_path: Path) -> None:
    shards(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    text = json.loads(path.read_text())
    text["weight_map"]["extra"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(text))
    with pytest.raises(SourceError, match="names extra, which is in none of its shards"):
        open_source(tmp_path)
