"""safetensors files: their bytes, the library's opinion of them, what is refused, what is left."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from dqconvert.formats import header
from dqconvert.formats.folder import OutputFolder
from dqconvert.formats.source import open_source
from dqconvert.formats.writer import StreamWriter
from dqconvert.quantizers.errors import OutputError, SourceError
from dqconvert.quantizers.spec import DTYPE_BITS, TensorInfo
from dqconvert.quantizers.tensors import DTYPE_NAMES, TORCH_DTYPES

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


def filled(infos: Infos, seed: int = 0) -> dict[str, Tensor]:
    """Tensors of random bytes (bool: of random truth)."""
    rng = torch.Generator().manual_seed(seed)
    found = {}
    for name, info in infos.items():
        top = 2 if info.dtype == "BOOL" else 256
        raw = torch.randint(top, (info.nbytes,), generator=rng, dtype=torch.uint8)
        found[name] = raw.view(TORCH_DTYPES[info.dtype]).view(info.shape)
    return found


def infos_of(tensors: dict[str, Tensor]) -> Infos:
    return {k: TensorInfo(DTYPE_NAMES[t.dtype], tuple(t.shape)) for k, t in tensors.items()}


def same(one: Tensor, two: Tensor) -> bool:
    """Equal in dtype, shape and bytes."""
    raw = (t.contiguous().view(-1).view(torch.uint8) for t in (one, two))
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(*raw)


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    with StreamWriter(path, infos_of(tensors), metadata or {}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(SourceError, match=r"\.gguf files cannot be read"):
        open_source(tmp_path / "a.gguf")
    with pytest.raises(SourceError, match="no such file"):
        open_source(tmp_path / "none.safetensors")
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


# -------------------------------------------------------------------------------- writing

MANY = {f"t{n}": TensorInfo("F32" if n % 3 else "U8", (n, 7)) for n in range(40)}


@pytest.mark.parametrize("seed", range(3))
def test_any_order_from_any_thread_gives_the_same_bytes(seed: int, tmp_path: Path) -> None:
    tensors = filled(MANY, 9)
    write(tmp_path / "one", tensors, {"a": "b"})
    order = torch.randperm(len(MANY), generator=torch.Generator().manual_seed(seed)).tolist()
    names = [list(tensors)[place] for place in order]
    with (
        StreamWriter(tmp_path / "two", MANY, {"a": "b"}) as writer,
        ThreadPoolExecutor(8) as pool,
    ):
        list(pool.map(lambda name: writer.write(name, tensors[name]), names))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert left_in(tmp_path) == ["one", "two"]


def test_tensors_need_not_be_contiguous(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(12.0).view(3, 4).T, "b": torch.ones(1).expand(5)}
    write(tmp_path / "a", tensors)
    assert all(same(t, tensors[name]) for name, t in load_file(tmp_path / "a").items())


def test_a_broken_promise_is_our_mistake(tmp_path: Path) -> None:
    infos = {"a": TensorInfo("F32", (2, 3))}
    good = torch.zeros(2, 3)
    for wrong in (torch.zeros(3, 2), torch.zeros(2, 3).half(), torch.zeros(6)):
        with (
            pytest.raises(ValueError, match="a: promised"),
            StreamWriter(tmp_path / "f", infos, {}) as writer,
        ):
            writer.write("a", wrong)
        assert left_in(tmp_path) == []
    with (
        pytest.raises(ValueError, match="a: written twice"),
        StreamWriter(tmp_path / "f", infos, {}) as writer,
    ):
        writer.write("a", good)
        writer.write("a", good)
    assert left_in(tmp_path) == []
    with pytest.raises(KeyError), StreamWriter(tmp_path / "f", infos, {}) as writer:
        writer.write("b", good)
    assert left_in(tmp_path) == []
    with (
        pytest.raises(ValueError, match="1 tensors were never written"),
        StreamWriter(tmp_path / "f", infos, {}),
    ):
        pass
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_after_an_exception(kind: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "f").write_text("an earlier output")
    open_files = len(os.listdir("/proc/self/fd"))
    with (
        pytest.raises(kind),
        StreamWriter(tmp_path / "f", {"a": TensorInfo("U8", (3,))}, {}) as writer,
    ):
        assert left_in(tmp_path) == ["f", "f.partial"]
        writer.write("a", torch.zeros(3, dtype=torch.uint8))
        raise kind
    assert left_in(tmp_path) == ["f"]
    assert (tmp_path / "f").read_text() == "an earlier output"
    assert len(os.listdir("/proc/self/fd")) == open_files


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OutputError, match=r"f: No space left on device; 0\.00 GB are needed"):
        write(tmp_path / "f", {"a": torch.zeros(3)})
    assert left_in(tmp_path) == []


def test_a_disk_that_fills_up_under_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = os.pwrite, iter(range(100))

    def filling(*args: Any) -> int:
        if next(count) > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, "pwrite", filling)
    tensors = filled(MANY, 9)
    with (
        pytest.raises(OutputError, match="No space left"),
        StreamWriter(tmp_path / "f", MANY, {}) as writer,
        ThreadPoolExecutor(4) as pool,
    ):
        list(pool.map(lambda name: writer.write(name, tensors[name]), tensors))
    assert left_in(tmp_path) == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:5], at))
    tensors = filled(MANY, 9)
    write(tmp_path / "f", tensors)
    assert all(same(t, tensors[name]) for name, t in load_file(tmp_path / "f").items())


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file or directory"):
        write(tmp_path / "none" / "f", {"a": torch.zeros(3)})
    (tmp_path / "f").mkdir()
    with pytest.raises(OutputError, match="Is a directory"):
        write(tmp_path / "f", {"a": torch.zeros(3)})
    assert left_in(tmp_path) == ["f"]


# --------------------------------------------------------------------------- output folders


def finished(path: Path, content: str = "new", overwrite: bool = False) -> None:
    with OutputFolder(path, overwrite) as folder:
        (folder / "dqconvert.json").write_text(content)


def test_an_output_folder_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out"
    with OutputFolder(path) as folder:
        (folder / "dqconvert.json").write_text("new")
        assert not path.exists()
    assert left_in(path) == ["dqconvert.json"] and left_in(path.parent) == ["out"]


def test_an_output_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "out"
    finished(path, "old")
    (path / "stale").write_text("")
    with pytest.raises(OutputError, match="exists; choose another -o, or give --overwrite"):
        finished(path)
    assert (path / "dqconvert.json").read_text() == "old"
    finished(path, "new", overwrite=True)
    assert (path / "dqconvert.json").read_text() == "new"
    assert left_in(path) == ["dqconvert.json"] and left_in(tmp_path) == ["out"]
    finished(tmp_path / "fresh", overwrite=True)
    assert left_in(tmp_path) == ["fresh", "out"]


def test_a_foreign_folder_or_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    (tmp_path / "file").write_text("")
    for name in ("out", "file"):
        with pytest.raises(OutputError, match="was not written by dqconvert"):
            finished(tmp_path / name, overwrite=True)
    assert left_in(tmp_path) == ["file", "out"] and left_in(tmp_path / "out") == ["thesis.tex"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_that_appears_meanwhile_is_not_replaced(overwrite: bool, tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(OutputError), OutputFolder(path, overwrite) as folder:
        (folder / "dqconvert.json").write_text("ours")
        path.mkdir()
        (path / "theirs").write_text("")
    assert left_in(tmp_path) == ["out"] and left_in(path) == ["theirs"]


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_output_folder_leaves_nothing_after_an_exception(
    kind: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "out"
    with pytest.raises(kind), OutputFolder(path) as folder:
        (folder / "half").write_text("")
        raise kind
    assert left_in(tmp_path) == []
    finished(path, "old")
    with pytest.raises(kind), OutputFolder(path, overwrite=True) as folder:
        raise kind
    assert (path / "dqconvert.json").read_text() == "old" and left_in(tmp_path) == ["out"]


def test_an_output_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Not a directory"):
        finished(tmp_path / "file" / "out")


def test_an_old_output_survives_a_failed_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rename = tmp_path / "out", Path.rename
    finished(path, "old")

    def failing(self: Path, goal: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, goal)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="Input/output error"):
        finished(path, "new", overwrite=True)
    assert (path / "dqconvert.json").read_text() == "old"
    assert left_in(tmp_path) == ["out"]
