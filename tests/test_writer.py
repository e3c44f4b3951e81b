"""Writing: any order, all bytes or none, and nothing of other people replaced."""

from __future__ import annotations

import errno
import os
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dqconvert.formats.folder import OutputFolder
from dqconvert.formats.writer import StreamWriter
from dqconvert.quantizers.errors import OutputError
from dqconvert.quantizers.spec import TensorInfo

containers = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("containers.py"))))
filled, same = containers.filled, containers.same
write, left_in = containers.write, containers.left_in

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
        assert left_in(tmp_path) == ["f", f"f.{os.getpid()}.partial"]
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


def test_only_what_the_manifest_names_is_deleted(tmp_path: Path) -> None:
    path = tmp_path / "out"
    finished(path, '{"files": {"weights": {}}}')
    (path / "weights").write_text("")
    (path / "mine").write_text("")
    with pytest.raises(OutputError, match="holds mine, which dqconvert did not write"):
        finished(path, overwrite=True)
    assert left_in(path) == ["dqconvert.json", "mine", "weights"]
    (path / "mine").unlink()
    finished(path, overwrite=True)
    assert left_in(path) == ["dqconvert.json"]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    finished(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    finished(tmp_path / "link", "new", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "dqconvert.json").read_text() == "new"


def test_a_hash_that_cannot_be_finished_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never the hash of a part."""
    calls = iter(range(100))

    def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
        if next(calls):
            raise OSError(errno.EIO, "Input/output error")
        return os.pread(fd, 64, offset) and 64

    monkeypatch.setattr("dqconvert.formats.hashing.os.preadv", failing)
    infos = {"a": TensorInfo("U8", (4096,))}
    with (
        pytest.raises(OutputError, match="Input/output error"),
        StreamWriter(tmp_path / "f", infos, {}) as writer,
    ):
        writer.write("a", torch.zeros(4096, dtype=torch.uint8))
    assert left_in(tmp_path) == []


def test_an_output_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "out"
    finished(path, "old")
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
