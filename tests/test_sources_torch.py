"""Files of torch.save, 8-bit ones among them, and folders that hold a model more than once."""

from __future__ import annotations

import json
import os
import pickle
import runpy
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from dqconvert.formats.source import notes_of, open_source
from dqconvert.quantizers.errors import SourceError

torch.set_num_threads(1)
checkpoints = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))
done, refused, WEIGHTS = checkpoints.done, checkpoints.refused, checkpoints.WEIGHTS
Tensors = dict[str, Tensor]
MODEL = Path(__file__).parents[1] / "converter/data/flux-digits/transformer"


@pytest.fixture(scope="module")
def exact() -> Tensors:
    source = open_source(MODEL)
    return {name: source.read(name) for name in source.infos}


@pytest.fixture(scope="module")
def needed(tmp_path_factory: pytest.TempPathFactory, exact: Tensors) -> bytes:
    """What a conversion of the safetensors file gives."""
    folder = tmp_path_factory.mktemp("needed")
    save_file(checkpoints.original(exact), folder / "model.safetensors")
    return converted(folder / "model.safetensors", folder / "out")


def converted(model: Path, out: Path) -> bytes:
    done(model, "--scheme", "int8", "-q", "-o", out)
    (file,) = out.glob("*.safetensors")
    return file.read_bytes()


def worse(tensors: Tensors) -> Tensors:
    return {name: tensor + 1 for name, tensor in tensors.items()}


WAYS: dict[str, Any] = {
    "plain": lambda t: t,
    "module": lambda t: {"module": {f"_orig_mod.{n}": x for n, x in t.items()}, "step": 7},
    "state_dict": lambda t: {"epoch": 1, "state_dict": {f"model.{n}": x for n, x in t.items()}},
    "ema": lambda t: {
        "generator": {f"model.{n}": x for n, x in worse(t).items()},
        "generator_ema": {f"model._fsdp_wrapped_module.{n}": x for n, x in t.items()},
        "critic": worse(t),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
    },
    "nested": lambda t: {
        "state_dict": {"module": {f"diffusion_model.{n}": x for n, x in t.items()}}
    },
    "parameters": lambda t: {n: torch.nn.Parameter(x) for n, x in t.items()},
    "whole": lambda t: {
        **{f"model.diffusion_model.{n}": x for n, x in t.items()},
        "first_stage_model.encoder.conv_in.weight": torch.ones(4, 4),
    },
}


@pytest.mark.parametrize(
    ("way", "ending"),
    [(way, (".pt", ".pth", ".ckpt", ".bin")[i % 4]) for i, way in enumerate(WAYS)],
)
def test_every_wrapping_gives_the_same_bytes(
    exact: Tensors, needed: bytes, tmp_path: Path, way: str, ending: str
) -> None:
    file = tmp_path / f"model{ending}"
    torch.save(WAYS[way](checkpoints.original(exact)), file)
    assert converted(file, tmp_path / "out") == needed
    said = done("inspect", file)
    assert "FLUX.1" in said
    text = done(file, "--scheme", "nvfp4", "--dry-run")
    averaged = "the averaged weights under generator_ema were taken, not generator"
    assert (averaged in text) == (way == "ema")
    assert ("1 tensors of other components" in text) == (way == "whole")
    assert "sound" in done("verify", tmp_path / "out", "--against", file)


def test_a_folder_of_torch_files(exact: Tensors, needed: bytes, tmp_path: Path) -> None:
    """In shards with an index, and not at all where safetensors lie beside them."""
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = checkpoints.original(exact)
    names = sorted(tensors)
    weight_map = {}
    for number in (0, 1):
        file = f"pytorch_model-0000{number + 1}-of-00002.bin"
        part = {name: tensors[name].clone() for name in names[number::2]}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert converted(folder, tmp_path / "out").endswith(needed[-1000:])
    assert open_source(index).infos.keys() == tensors.keys()
    save_file(exact, folder / WEIGHTS)
    assert open_source(folder).files == (folder / WEIGHTS,)


def test_elements_out_of_order_and_shared_storage(tmp_path: Path) -> None:
    whole = torch.arange(48.0).view(6, 8)
    tensors = {
        "transposed": whole.T,
        "cut": whole[1:5, 2:7],
        "again": whole,
        "stretched": torch.ones(3, 1).expand(3, 5),
        "scalar": torch.tensor(2.5).half(),
        "empty": torch.zeros(0, 3),
        "fp8": whole.to(torch.float8_e4m3fn),
        "codes": torch.arange(8, dtype=torch.int8),
    }
    torch.save(tensors, tmp_path / "x.pt")
    source = open_source(tmp_path / "x.pt")
    assert list(source.infos) == list(tensors)
    for name, tensor in tensors.items():
        assert checkpoints.same_bits(source.read(name), tensor.contiguous()), name
        if tensor.ndim == 2 and len(tensor) > 2:
            assert checkpoints.same_bits(source.read(name, (1, 3)), tensor[1:3].contiguous())
            out = torch.empty_like(tensor[1:3].contiguous())
            source.fill(name, out, (1, 3))
            assert checkpoints.same_bits(out, tensor[1:3].contiguous())
    assert notes_of(source) == ()


# ---------------------------------------------------------------------------------- what is wrong


class Evil:
    """Pickled, it is a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_no_code_is_run(exact: Tensors, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    torch.save({"model": dict(exact), "config": Evil(f"touch {witness}")}, tmp_path / "evil.pt")
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "whole.pt")
    with (tmp_path / "bare.pt").open("wb") as file:
        pickle.dump(Evil(f"touch {witness}"), file)
    for name in ("evil", "whole", "bare"):
        text = refused(tmp_path, tmp_path / f"{name}.pt", "--scheme", "int8", "-o", tmp_path / "o")
        assert f"{name}.pt: " in text and len(text.splitlines()) == 1
        assert name == "bare" or "none was run" in text
        assert len(text) < 500 + len(str(tmp_path))
        assert refused(tmp_path, "inspect", tmp_path / f"{name}.pt") == text
    assert not witness.exists()


def test_odd_files_are_refused_in_a_line(exact: Tensors, tmp_path: Path) -> None:
    def said(name: str) -> str:
        with pytest.raises(SourceError) as error:
            open_source(tmp_path / name)
        text = str(error.value)
        assert name in text and "\n" not in text
        return text

    torch.save({"a": torch.ones(1000)}, tmp_path / "good.pt")
    whole = (tmp_path / "good.pt").read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        assert "cut off" in said("cut.pt")
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert "before 1.6" in said("old.pt")
    torch.save([torch.ones(3)], tmp_path / "list.pt")
    torch.save({"step": 3}, tmp_path / "none.pt")
    torch.save({"model": {"step": 3}}, tmp_path / "inner.pt")
    assert all("no state dict" in said(f"{name}.pt") for name in ("list", "none", "inner"))
    torch.save({"a": torch.ones(3, dtype=torch.complex64)}, tmp_path / "complex.pt")
    assert "tensor a is torch.complex64" in said("complex.pt")
    torch.save({"m.a": torch.ones(1), "_orig_mod.m.a": torch.ones(1)}, tmp_path / "twice.pt")
    assert "m.a is there twice" in said("twice.pt")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    said("zip.pt")
    with (
        zipfile.ZipFile(tmp_path / "good.pt") as good,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in good.namelist():
            archive.writestr(name, good.read(name))
    assert "is compressed" in said("packed.pt")
    (tmp_path / "folder.pt").mkdir()
    said("folder.pt")
    said("absent.pt")


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 1500), byte=st.integers(0, 255))
def test_damage_is_an_error_or_none(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: int
) -> None:
    folder = tmp_path_factory.mktemp("damage")
    torch.save({"a": torch.ones(10), "b": {"c": torch.ones(3)}}, folder / "x.pt")
    data = bytearray((folder / "x.pt").read_bytes())
    data[place % len(data)] = byte
    (folder / "x.pt").write_bytes(data)
    try:
        source = open_source(folder / "x.pt")
        for name in source.infos:
            source.read(name)
    except SourceError as error:
        assert "\n" not in str(error)


# ---------------------------------------------------------------------------------- folders


NAMES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "variant": (("m.fp16.safetensors", "m.safetensors"), "m.safetensors"),
    "only variant": (("m.fp16.safetensors",), "m.fp16.safetensors"),
    "ema": (("m.non_ema.safetensors", "m.safetensors"), "m.safetensors"),
    "sft": (("m.sft",), "m.sft"),
}


@pytest.mark.parametrize("case", NAMES)
def test_the_plain_one_of_several_variants(tmp_path: Path, case: str) -> None:
    names, chosen = NAMES[case]
    for name in names:
        save_file({"a": torch.ones(1)}, tmp_path / name)
    assert [path.name for path in open_source(tmp_path).files] == [chosen]
    assert open_source(tmp_path / chosen).infos.keys() == {"a"}


def test_variants_in_shards(exact: Tensors, tmp_path: Path) -> None:
    folder = checkpoints.shard(exact, tmp_path / "m", 2)
    index = folder / f"{WEIGHTS}.index.json"
    for name, place in (("fp16-00001-of-00001", ".index.fp16.json"), ("fp16", "")):
        save_file({"x": torch.ones(1)}, folder / f"{Path(WEIGHTS).stem}.{name}.safetensors")
        said = {"weight_map": {"x": f"{Path(WEIGHTS).stem}.{name}.safetensors"}}
        if place:
            (folder / f"{WEIGHTS}{place}").write_text(json.dumps(said))
    assert open_source(folder).infos.keys() == exact.keys()
    index.unlink()
    (folder / f"{WEIGHTS}.index.fp16.json").unlink()
    assert open_source(folder).infos.keys() == exact.keys()


def test_tensors_of_other_kinds_are_refused_by_name(exact: Tensors, tmp_path: Path) -> None:
    """What a pickle holds in another way than as numbers in order, and linears that are none."""
    name = next(n for n in exact if n.endswith("attn.to_q.weight"))
    whole = exact[name].float()
    odd = {
        "sparse": whole.to_sparse(),
        "negated": torch.complex(whole, whole).conj().imag,
        "complex": whole.to(torch.complex64),
        "scalar": torch.tensor(1.0),
        "flat": whole.flatten(),
        "empty": whole[:0],
    }
    for kind, tensor in odd.items():
        file = tmp_path / f"{kind}.pt"
        torch.save({**exact, name: tensor}, file)
        text = refused(tmp_path, file, "--scheme", "int8", "-o", tmp_path / "out")
        assert str(file) in text and name in text, kind
