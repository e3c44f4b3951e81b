"""GGUF files: gguf-py's opinion of ours, ours of gguf-py's, and what is decoded."""

from __future__ import annotations

import hashlib
import os
import runpy
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from dqconvert.formats import gguf_header
from dqconvert.formats.fileset import FileSet
from dqconvert.formats.gguf_source import Decoded, GGUFSource, decoded_types
from dqconvert.formats.source import open_source
from dqconvert.formats.writer import StreamWriter
from dqconvert.quantizers.errors import SourceError
from dqconvert.quantizers.spec import BLOCKS, TensorInfo

containers = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("containers.py"))))
same, left_in = containers.same, containers.left_in
lawful = settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
Infos = dict[str, TensorInfo]
PLAIN = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")


@st.composite
def info_any(draw: st.DrawFn) -> TensorInfo:
    dtype = draw(st.sampled_from([*PLAIN, *BLOCKS]))
    outer = draw(st.lists(st.integers(0, 3), max_size=4))
    if dtype in BLOCKS:
        return TensorInfo(dtype, (*outer, BLOCKS[dtype][0] * draw(st.integers(0, 2))))
    return TensorInfo(dtype, tuple(outer))


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
floats = st.floats(width=32, allow_nan=False)
values = st.one_of(
    text, st.booleans(), st.integers(-(1 << 63), (1 << 64) - 1), floats,
    *(st.lists(kind, min_size=1, max_size=4) for kind in (text, st.booleans(), floats)),
    st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=1, max_size=4),
)  # fmt: skip
infos_any = st.dictionaries(text.filter(bool), info_any(), max_size=6)
metadata_any = st.dictionaries(text.map("x.{}".format), values, max_size=6)


def filled(infos: Mapping[str, TensorInfo], seed: int = 0) -> dict[str, Tensor]:
    """Random bytes of what holds each tensor."""
    found: dict[str, Tensor] = containers.filled({n: i.stored for n, i in infos.items()}, seed)
    return found


def write(
    path: Path, infos: Infos, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> str:
    with StreamWriter(path, infos, metadata) as writer:
        for name in reversed(list(tensors)):
            writer.write(name, tensors[name])
    return writer.sha256


def as_read(info: TensorInfo) -> TensorInfo:
    return TensorInfo(info.dtype, info.shape or (1,))


def raw(array: Any) -> bytes:
    return bytes(np.ascontiguousarray(array).tobytes())


# ---------------------------------------------------------------------------- the oracle


@lawful
@given(infos=infos_any, metadata=metadata_any)
def test_ours_are_read_by_gguf_py_and_by_us(
    infos: Infos, metadata: dict[str, Any], tmp_path: Path
) -> None:
    path, tensors = tmp_path / "a.gguf", filled(infos)
    digest = write(path, infos, tensors, metadata)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    theirs = gguf.GGUFReader(path)
    assert [tensor.name for tensor in theirs.tensors] == list(infos)
    for tensor, (name, info) in zip(theirs.tensors, infos.items(), strict=True):
        assert tensor.tensor_type.name == info.dtype
        assert tuple(reversed(tensor.shape.tolist())) == as_read(info).shape
        assert raw(tensor.data) == raw(tensors[name].view(-1).view(torch.uint8))
        assert tensor.data_offset % 32 == 0
    assert {k: theirs.fields[k].contents() for k in metadata} == metadata
    source = GGUFSource((path,))
    assert list(source.infos.items()) == [(name, as_read(info)) for name, info in infos.items()]
    assert source.metadata == metadata
    for name, tensor in tensors.items():
        shape = as_read(infos[name]).stored.shape
        assert same(source.read(name), tensor.view(shape))


@lawful
@given(infos=infos_any, metadata=metadata_any, alignment=st.sampled_from([None, 8, 32, 256]))
def test_gguf_pys_are_read_by_us(
    infos: Infos, metadata: dict[str, Any], alignment: int | None, tmp_path: Path
) -> None:
    path, tensors = tmp_path / "a.gguf", filled(infos)
    writer = gguf.GGUFWriter(path, "flux")
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, value in metadata.items():
        single = value[0] if isinstance(value, list) else value
        kind = GGUFValueType.INT64 if type(single) is int else GGUFValueType.get_type(single)
        if type(value) is int and value >= 1 << 63:
            kind = GGUFValueType.UINT64
        whole = GGUFValueType.ARRAY if isinstance(value, list) else kind
        writer.add_key_value(key, value, whole, kind)
    for name, info in infos.items():
        array = tensors[name].view(-1).view(torch.uint8).numpy()
        writer.add_tensor_info(name, info.shape, np.dtype("V1"), array.nbytes, Kind[info.dtype])
        writer.tensors[-1][name].tensor = array
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GGUFSource((path,))
    extra = {"general.architecture": "flux"} | (
        {"general.alignment": alignment} if alignment else {}
    )
    assert source.metadata == extra | metadata
    assert list(source.infos.items()) == list(infos.items())
    for name, tensor in tensors.items():
        assert same(source.read(name), tensor)
        assert source.where(name) == path


TYPED = {
    "u32": (0xFFFFFFFF, GGUFValueType.UINT32),
    "u64": (1 << 32, GGUFValueType.UINT64),
    "i64": (-1, GGUFValueType.INT64),
    "bool": (True, GGUFValueType.BOOL),
    "f32": (0.5, GGUFValueType.FLOAT32),
    "str": ("é", GGUFValueType.STRING),
}


def test_the_types_of_metadata(tmp_path: Path) -> None:
    """ComfyUI wants orig_shape as an array of i32, ggml the alignment as u32."""
    lists = {f"list.{key}": [value, value] for key, (value, _) in TYPED.items()}
    single = {key: value for key, (value, _) in TYPED.items()}
    small = {"shape": [5, -1], "alignment": 32, "general.alignment": 64, "none": []}
    write(tmp_path / "a.gguf", {}, {}, single | lists | small)
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    for key, (_, kind) in TYPED.items():
        assert fields[key].types == [kind]
        wide = GGUFValueType.INT64 if "INT" in kind.name else kind
        assert fields[f"list.{key}"].types == [GGUFValueType.ARRAY, wide if key != "i64" else 5]
    assert fields["shape"].types == [GGUFValueType.ARRAY, GGUFValueType.INT32]
    assert fields["general.alignment"].types == [GGUFValueType.UINT32]
    assert gguf_header.read(tmp_path / "a.gguf").metadata["none"] == []


GOLDEN = (
    b"GGUF\x03\0\0\0\x02\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0"
    b"\x01\0\0\0\0\0\0\0k\x04\0\0\0\x07\0\0\0"
    b"\x01\0\0\0\0\0\0\0a\x02\0\0\0\x20\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0" + bytes(8) +
    b"\x01\0\0\0\0\0\0\0b\x01\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\x20" + bytes(7)
)  # fmt: skip


def test_the_bytes_of_a_tiny_file(tmp_path: Path) -> None:
    """Extents innermost first, zeros up to multiples of 32, at the end too; a scalar as [1]."""
    infos = {"a": TensorInfo("Q4_0", (1, 32)), "b": TensorInfo("F32", ())}
    tensors = {"a": torch.arange(18, dtype=torch.uint8).view(1, 18), "b": torch.tensor(1.0)}
    write(tmp_path / "a.gguf", infos, tensors, {"k": 7})
    start = GOLDEN + bytes(-len(GOLDEN) % 32)
    buffer = bytes(range(18)) + bytes(14) + b"\x00\x00\x80\x3f" + bytes(28)
    assert (tmp_path / "a.gguf").read_bytes() == start + buffer


@pytest.mark.parametrize("fallocate", [True, False])
def test_any_order_from_any_thread(
    fallocate: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of blocks too, and zeros between tensors where the disk reserves no space."""
    if not fallocate:
        monkeypatch.delattr(os, "posix_fallocate")
    infos = {f"t{n}": TensorInfo("Q5_K" if n % 2 else "F16", (n, 256)) for n in range(20)}
    infos["odd"] = TensorInfo("I8", (3,))
    tensors = filled(infos, 9)
    one = write(tmp_path / "one.gguf", infos, tensors, {})

    def put(name: str) -> None:
        for row in range(infos[name].shape[0]):
            writer.write(name, tensors[name][row : row + 1], row)

    files = {tmp_path / "two.gguf": tuple(infos)}
    with FileSet(files, infos, {}) as writer, ThreadPoolExecutor(4) as pool:
        writer.write("t0", tensors["t0"])
        list(pool.map(put, [name for name in reversed(infos) if name != "t0"]))
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    assert writer.digests[tmp_path / "two.gguf"] == one


@pytest.mark.parametrize(
    ("infos", "metadata"),
    [
        ({"a": TensorInfo("U8", (3,))}, {}),
        ({"a": TensorInfo("Q4_K", (2, 128))}, {}),
        ({"a": TensorInfo("Q8_0", ())}, {}),
        ({}, {"a": None}),
        ({}, {"a": [1, "b"]}),
        ({}, {"a": [True, 1]}),
        ({}, {"a": 1 << 64}),
        ({}, {"general.alignment": 48}),
    ],
)
def test_what_gguf_cannot_hold_is_our_mistake(
    infos: Infos, metadata: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"^a: |general\.alignment"):
        StreamWriter(tmp_path / "a.gguf", infos, metadata)
    with (
        pytest.raises(ValueError, match="b: promised"),
        StreamWriter(tmp_path / "a.gguf", {"b": TensorInfo("Q4_K", (2, 256))}, {}) as writer,
    ):
        writer.write("b", torch.zeros(2, 256))
    assert left_in(tmp_path) == []


# ------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_K", "IQ4_NL"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
def test_blocks_are_decoded(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    info = TensorInfo(dtype, (*shape, 2 * BLOCKS[dtype][0]))
    infos = {"w": info, "b": TensorInfo("BF16", (7,)), "none": TensorInfo(dtype, (0, 256))}
    tensors = filled(infos, 3)
    tensors["w"][..., ::7] &= 0x3B  # random scales are seldom numbers
    write(tmp_path / "a.gguf", infos, tensors, {"general.architecture": "flux"})
    source = open_source(tmp_path)
    assert isinstance(source, Decoded)
    assert decoded_types(source) == {dtype: 2}
    assert source.infos["w"] == TensorInfo("F32", info.shape)
    assert source.infos["b"] == infos["b"] and source.files == (tmp_path / "a.gguf",)
    assert source.metadata == {"general.architecture": "flux"}
    wanted = torch.from_numpy(gguf.dequantize(tensors["w"].numpy(), Kind[dtype]))
    assert torch.equal(source.read("w").nan_to_num(), wanted.nan_to_num())
    assert torch.equal(source.read("w", (1, 2)).nan_to_num(), wanted[1:2].nan_to_num())
    out = torch.empty(info.shape)
    source.fill("w", out)
    assert torch.equal(out.nan_to_num(), wanted.nan_to_num())
    assert same(source.read("b"), tensors["b"]) and same(
        source.read("b", (2, 5)), tensors["b"][2:5]
    )
    source.fill("b", bias := torch.empty(7, dtype=torch.bfloat16))
    assert same(bias, tensors["b"])
    assert source.read("none").shape == (0, 256) and source.where("w").name == "a.gguf"


def test_a_large_tensor_is_decoded_in_pieces(tmp_path: Path) -> None:
    infos = {"w": TensorInfo("Q8_0", (700, 4096))}
    tensors = filled(infos)
    tensors["w"].view(700, -1, 34)[..., 1] &= 0x3B
    write(tmp_path / "a.gguf", infos, tensors, {})
    wanted = torch.from_numpy(gguf.dequantize(tensors["w"].numpy(), Kind.Q8_0))
    source = Decoded(GGUFSource((tmp_path / "a.gguf",)))
    assert torch.equal(source.read("w"), wanted)
    assert torch.equal(source.read("w", (255, 699)), wanted[255:699])


def test_names_without_their_prefix(tmp_path: Path) -> None:
    infos = {"model.a": TensorInfo("Q8_0", (1, 32)), "vae.a": TensorInfo("F32", (2,))}
    write(tmp_path / "a.gguf", infos, filled(infos), {})
    source = Decoded(GGUFSource((tmp_path / "a.gguf",), "model."))
    assert list(source.infos) == ["a"] and decoded_types(source) == {"Q8_0": 1}
    assert source.read("a").shape == (1, 32)


def test_gguf_and_safetensors_in_one_folder(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", {}, {}, {})
    assert isinstance(open_source(tmp_path), Decoded)
    save_file({"b": torch.ones(2)}, tmp_path / "b.safetensors")
    with pytest.raises(SourceError, match=r"several checkpoints \(b\.safetensors, a\.gguf\)"):
        open_source(tmp_path)
    (tmp_path / "b.safetensors").rename(tmp_path / "b.gguf")
    with pytest.raises(SourceError, match=r"several checkpoints \(a\.gguf, b\.gguf\)"):
        open_source(tmp_path)
