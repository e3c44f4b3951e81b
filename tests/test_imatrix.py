"""Importance matrices: both containers, both ways, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dqconvert.formats import imatrix
from dqconvert.quantizers.errors import OutputError, SourceError

lawful = settings(
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
means = st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=9).map(torch.tensor)
matrices = st.dictionaries(st.text(min_size=1, max_size=9), means, min_size=1, max_size=4)
suffixes = pytest.mark.parametrize("suffix", ["dat", "gguf"])


def entry(name: str, calls: int, sums: list[float], channels: int | None = None) -> bytes:
    """As stable-diffusion.cpp's save_imatrix and llama.cpp's save_imatrix_legacy lay it down."""
    count = len(sums) if channels is None else channels
    start = struct.pack("<i", len(name.encode())) + name.encode()
    return start + struct.pack("<ii", calls, count) + np.float32(sums).tobytes()


def dat(*entries: bytes, end: bytes = struct.pack("<i", 0)) -> bytes:
    return struct.pack("<i", len(entries)) + b"".join(entries) + end


def theirs(path: Path, tensors: dict[str, list[list[float]]]) -> None:
    """As llama-imatrix writes GGUF."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text"])
    writer.add_uint32("imatrix.chunk_count", 2)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in tensors.items():
        writer.add_tensor(name, np.float32(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@suffixes
@lawful
@given(values=matrices)
def test_what_is_written_is_read(values: dict[str, Tensor], suffix: str, tmp_path: Path) -> None:
    imatrix.write(tmp_path / f"a.{suffix}", values)
    assert equal(imatrix.read(tmp_path / f"a.{suffix}"), values)


@suffixes
def test_counts_weigh_but_do_not_change_the_mean(suffix: str, tmp_path: Path) -> None:
    values = {"a": torch.rand(64), "b": torch.rand(7).double()}
    for count in (3, {"a": 1000, "b": 7}):
        imatrix.write(tmp_path / f"a.{suffix}", values, count, ["x", "y"])
        for name, found in imatrix.read(tmp_path / f"a.{suffix}").items():
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, values[name].float())


def test_the_bytes_of_a_dat_file(tmp_path: Path) -> None:
    """Names in order, calls times the mean, then the calls and the text."""
    values = {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor([0.5])}
    imatrix.write(tmp_path / "a.dat", values, {"a": 2, "b": 4}, ["one", "two"])
    end = struct.pack("<ii", 4, 8) + b"one, two"
    wanted = dat(entry("a", 2, [1.0]), entry("b", 4, [4.0, 8.0]), end=end)
    assert (tmp_path / "a.dat").read_bytes() == wanted


@pytest.mark.parametrize("end", [b"", struct.pack("<i", 9), struct.pack("<ii", 9, 1) + b"x"])
def test_a_dat_file_of_others(end: bytes, tmp_path: Path) -> None:
    """Divided in single precision, as llama-quantize does."""
    sums = np.random.default_rng(0).chisquare(1, 100).astype(np.float32)
    content = dat(entry("é", 7, list(sums)), entry("b", 1, [3.0]), end=end)
    (tmp_path / "imatrix").write_bytes(content)
    found = imatrix.read(tmp_path / "imatrix")
    assert list(found) == ["é", "b"]
    assert found["é"].numpy().tobytes() == (sums / np.float32(7)).tobytes()


def test_a_gguf_file_as_llama_quantize_wants_it(tmp_path: Path) -> None:
    values = {"blk.0.attn_q.weight": torch.tensor([1.0, 0.0, 2.0])}
    imatrix.write(tmp_path / "a.gguf", values, 8, ["prompts.txt"])
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    wanted = {
        "general.type": "imatrix",
        "imatrix.datasets": ["prompts.txt"],
        "imatrix.chunk_count": 8,
        "imatrix.chunk_size": 1,
    }
    assert {key: reader.fields[key].contents() for key in wanted} == wanted
    sums, counts = reader.tensors
    assert sums.name == "blk.0.attn_q.weight.in_sum2" and sums.shape.tolist() == [3, 1]
    assert counts.name == "blk.0.attn_q.weight.counts" and counts.shape.tolist() == [1, 1]
    assert sums.data.tolist() == [[8.0, 0.0, 16.0]] and counts.data.tolist() == [[8.0]]


def test_a_gguf_file_of_others(tmp_path: Path) -> None:
    """Sums of the inputs themselves, which newer files hold beside, are of no use here."""
    sums = np.random.default_rng(0).chisquare(1, 100).astype(np.float32)
    tensors = {"a.in_sum2": [sums.tolist()], "a.counts": [[7.0]], "a.in_sum": [[0.0] * 100]}
    theirs(tmp_path / "a.gguf", tensors)
    (found,) = imatrix.read(tmp_path / "a.gguf").values()
    assert found.numpy().tobytes() == (sums / np.float32(7)).tobytes()


BROKEN = {
    "empty": (b"", "not an importance matrix"),
    "none": (dat(), "not an importance matrix"),
    "negative": (struct.pack("<i", -1) + bytes(99), "not an importance matrix"),
    "many": (struct.pack("<i", 1 << 30) + bytes(99), "not an importance matrix"),
    "name": (dat(struct.pack("<i", 1 << 30) + bytes(99)), "cut off, at byte 8"),
    "no name": (dat(struct.pack("<i", -5) + bytes(99)), "without channels"),
    "no text": (dat(struct.pack("<i", 1) + b"\xff" + bytes(99)), "no text at byte 8"),
    "channels": (dat(entry("a", 1, [1.0], 0)), "a: twice there, or without channels"),
    "more": (dat(entry("a", 1, [1.0], 1 << 30)), "cut off, at byte 17"),
    "short": (dat(entry("a", 1, [1.0, 2.0]), end=b"")[:-1], "cut off, at byte 17"),
    "twice": (dat(entry("a", 1, [1.0]), entry("a", 1, [1.0])), "a: twice there"),
    "no calls": (dat(entry("a", 0, [1.0])), "a: counts 0 rows"),
    "few calls": (dat(entry("a", -3, [1.0])), "a: counts -3 rows"),
    "nan": (dat(entry("a", 1, [1.0, float("nan")])), "a: holds NaN, infinity or negative"),
    "inf": (dat(entry("a", 1, [float("inf")])), "a: holds NaN, infinity or negative"),
    "below zero": (dat(entry("a", 1, [1.0, -1e-9])), "a: holds NaN, infinity or negative"),
    "gguf": (b"GGUF" + bytes(99), "is GGUF version 0"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_dat_files(name: str, tmp_path: Path) -> None:
    content, why = BROKEN[name]
    (tmp_path / "a.dat").write_bytes(content)
    with pytest.raises(SourceError, match=r"a\.dat: ") as caught:
        imatrix.read(tmp_path / "a.dat")
    assert why in str(caught.value)


ONE = [[1.0]]
BROKEN_GGUF = {
    "none": ({"a.weight": ONE}, "holds no importance matrix"),
    "no count": ({"a.in_sum2": ONE}, "a: sums without a count"),
    "no sums": ({"a.counts": ONE}, "a: has a count, but no sums"),
    "no rows": ({"a.in_sum2": ONE, "a.counts": [[0.0]]}, "a: counts 0.0 rows"),
    "nan rows": ({"a.in_sum2": ONE, "a.counts": [[float("nan")]]}, "a: counts nan rows"),
    "nan": ({"a.in_sum2": [[float("nan")]], "a.counts": ONE}, "a: holds NaN"),
    "below zero": ({"a.in_sum2": [[-1.0]], "a.counts": ONE}, "a: holds NaN, infinity or negative"),
    "experts": ({"a.in_sum2": [[1.0], [1.0]], "a.counts": [[1.0], [1.0]]}, "a: has several"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_GGUF)
def test_broken_gguf_files(name: str, tmp_path: Path) -> None:
    tensors, why = BROKEN_GGUF[name]
    theirs(tmp_path / "a.gguf", tensors)
    with pytest.raises(SourceError, match=r"a\.gguf: ") as caught:
        imatrix.read(tmp_path / "a.gguf")
    assert why in str(caught.value)


@suffixes
@pytest.mark.parametrize(
    "values", [torch.tensor([-1.0]), torch.tensor([torch.nan]), torch.zeros(0), torch.zeros(2, 2)]
)
def test_nonsense_is_our_mistake(values: Tensor, suffix: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a: .* are no mean squares"):
        imatrix.write(tmp_path / f"a.{suffix}", {"a": values})
    with pytest.raises(ValueError, match="a: counts 0 rows"):
        imatrix.write(tmp_path / f"a.{suffix}", {"a": torch.ones(1)}, 0)
    with pytest.raises(ValueError, match="no importances"):
        imatrix.write(tmp_path / f"a.{suffix}", {})
    assert not list(tmp_path.iterdir())


@suffixes
def test_files_that_cannot_be_opened(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="No such file"):
        imatrix.read(tmp_path / f"a.{suffix}")
    with pytest.raises(OutputError, match="No such file"):
        imatrix.write(tmp_path / "none" / f"a.{suffix}", {"a": torch.ones(3)})
