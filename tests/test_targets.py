"""Laws of all targets: a promise is what is packed, packing loses nothing, files are recognized
and their damage is named. They run over the registry, so a new module in formats/targets is
covered.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dqconvert.formats.form import PackedForm
from dqconvert.formats.recognition import fits
from dqconvert.formats.targets import Target, target, targets
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.spec import Scheme, TensorInfo

samples = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("samples.py"))))
forms, cases, files = samples.forms, samples.cases, samples.files
result_of, context_of, infos_of = samples.result_of, samples.context_of, samples.infos_of
same = samples.same


@pytest.mark.parametrize(("runtime", "scheme", "form"), cases())
def test_a_promise_is_what_is_packed(runtime: Target, scheme: Scheme, form: PackedForm) -> None:
    tensors = runtime.pack(form, result_of(form, "smooth" in scheme.steps))
    promised = {name: info.stored for name, info in runtime.promise(form).items()}
    assert infos_of(tensors) == promised
    assert all(t.is_contiguous() for t in tensors.values())
    assert len({t.data_ptr() for t in tensors.values()}) == len(tensors)


@pytest.mark.parametrize(("runtime", "scheme", "form"), cases())
def test_packing_loses_nothing(runtime: Target, scheme: Scheme, form: PackedForm) -> None:
    q = result_of(form, "smooth" in scheme.steps)
    back = runtime.unpack(form, runtime.pack(form, q))
    assert (back.spec, back.shift) == (q.spec, q.shift)
    assert back.rotation == q.rotation
    for field in ("codes", "codebook"):
        assert same(getattr(back, field), getattr(q, field)), field
    if form.layout.startswith("bitsandbytes"):  # has scales in other units, or in 8 bit
        loss = 0.008 * float(q.scale.max()) if form.layout.endswith("double") else 0.0
        assert bool(((back.scale - q.scale).abs() <= q.scale * 2**-22 + loss).all())
    else:
        assert same(back.scale, q.scale)
    assert (back.zero is None) == (q.zero is None)
    if q.zero is not None and back.zero is not None:  # some store (8 - zero) · scale in 16 bit
        assert bool(((back.zero - q.zero).abs() < 0.05).all())
    for field, loss in (("tensor_scale", 1e-6), ("input_scale", 1e-6), ("smooth", 2**-8)):
        # some runtimes have the inverse, and that of a smooth vector in 16 bit
        one, two = getattr(back, field), getattr(q, field)
        assert one is two or bool(((one.float() / two.float() - 1).abs() <= loss).all()), field
    assert (back.lowrank is None) == (q.lowrank is None)
    if q.lowrank is not None and back.lowrank is not None:
        assert same(back.lowrank.down, q.lowrank.down)
        assert same(back.lowrank.up, q.lowrank.up)
    if form.splits and q.bias is not None and back.bias is not None:
        # 1 may have been added in bf16 (nunchaku) and taken away again
        error = (back.bias.float() - q.bias.float()).abs()
        assert bool((error <= (1 + q.bias.float().abs()) * 2**-8).all())
    else:
        wide = q.bias is not None and runtime.NAME == "gguf"
        assert same(back.bias, q.bias.float() if wide and q.bias is not None else q.bias)


@pytest.mark.parametrize(("runtime", "scheme"), files())
def test_a_scheme_and_its_target_agree(runtime: Target, scheme: Scheme) -> None:
    assert runtime.accepts(scheme) is None
    assert any(runtime.problem(form) is None for form in forms(runtime, scheme))


@pytest.mark.parametrize(("runtime", "scheme"), files())
def test_a_target_recognizes_its_own_files(runtime: Target, scheme: Scheme) -> None:
    for layout in runtime.layouts(scheme):
        assert_recognized(runtime, scheme, layout)


def assert_recognized(runtime: Target, scheme: Scheme, layout: str) -> None:
    context, infos = context_of(runtime, scheme, layout)
    metadata, config = runtime.metadata(context), runtime.config(context) or {}
    assert all(isinstance(value, str | int) for value in metadata.values())
    json.dumps(config)
    file = runtime.recognize(infos, metadata, config)
    assert file is not None
    assert file.problems == ()
    assert file.rank == scheme.rank
    assert {form.layout for form in file.forms.values()} <= {layout, ""}
    assert file.forms.keys() == context.layers.keys()
    known = {
        layer: replace(found, splits=wrote.splits, shift=wrote.shift, parts=wrote.parts)
        for layer, found in file.forms.items()
        for wrote in [context.layers[layer]]
    }
    for layer, form in known.items():
        assert runtime.promise(form) == runtime.promise(context.layers[layer])
    # two schemes may write the same bytes (AWQ and GPTQ); one that mixes formats, those of another
    assert file.scheme is not None
    for name in (file.scheme, scheme.name):
        assert fits(runtime.NAME, name, known.values())
    others = [other for name, other in targets().items() if name != runtime.NAME]
    assert not [other for other in others if other.recognize(infos, metadata, config)]


def test_nothing_is_recognized_in_a_plain_checkpoint() -> None:
    infos = {"a.weight": TensorInfo("BF16", (8, 8)), "a.bias": TensorInfo("BF16", (8,))}
    for runtime in targets().values():
        assert runtime.recognize(infos, {"format": "pt"}, {"_class_name": "X"}) is None


def test_plans_need_no_torch() -> None:
    """Everything but pack and unpack, in a fresh interpreter."""
    code = """
import sys
from dqconvert.formats.form import FileContext, PackedForm
from dqconvert.formats.targets import targets
from dqconvert.quantizers.schemes import schemes
for name, runtime in targets().items():
    for scheme in schemes().values():
        if runtime.accepts(scheme) is not None or name not in scheme.targets:
            continue
        form = PackedForm(scheme.weight, (256, 256), rank=scheme.rank)
        runtime.problem(form), runtime.shift(form)
        context = FileContext("m", scheme, scheme.rank, {}, {"a": form})
        infos = {f"a.{k}": v for k, v in runtime.promise(form).items()}
        metadata, config = runtime.metadata(context), runtime.config(context) or {}
        runtime.filename(context), runtime.recognize(infos, metadata, config)
assert "torch" not in sys.modules, "torch was imported"
"""
    paths = {"PYTHONPATH": str(Path(__file__).parents[1] / "tools" / "ns")}
    subprocess.run([sys.executable, "-c", code], check=True, env=paths)


# damaged files


def damaged() -> list[Any]:
    return [
        pytest.param(target(name), schemes()[scheme], id=f"{name}-{scheme}")
        for name, scheme in (
            ("nunchaku", "svdquant-w4a4"),
            ("nunchaku", "svdquant-nvfp4"),
            ("diffusers", "svdquant-w4a4"),
            ("diffusers", "svdquant-nvfp4"),
            ("diffusers", "int8"),
            ("diffusers", "nvfp4"),
            ("diffusers", "gptq-w4a16"),
            ("diffusers", "bnb-nf4"),
            ("diffusers", "bnb-int8"),
            ("comfyui", "int8"),
            ("comfyui", "fp8-tensor"),
        )
    ]


@pytest.mark.parametrize(("runtime", "scheme"), damaged())
def test_every_missing_or_wrong_tensor_is_named(runtime: Target, scheme: Scheme) -> None:
    context, infos = context_of(runtime, scheme)
    metadata, config = runtime.metadata(context), runtime.config(context) or {}
    # a header alone cannot tell these from a layer without: a bias, a static scale, a scale
    # that nunchaku's loader takes as 1, a marker that the header repeats, zero points of nothing
    optional = {"comfy_quant", "input_scale", "wtscale" if runtime.NAME == "nunchaku" else ""}
    optional |= {"_weight_zero_point"}
    optional |= {"wcscales"} if runtime.NAME == "nunchaku" else set()
    for name, info in infos.items():
        suffix = name.rpartition(".")[2]
        if name == "norm.weight" or (suffix == "bias" and runtime.NAME != "nunchaku"):
            continue
        without = {key: value for key, value in infos.items() if key != name}
        file = runtime.recognize(without, metadata, config)
        layer = name.rpartition(".")[0]
        if suffix == "qweight" and runtime.NAME == "nunchaku":
            assert file is not None
            assert layer not in file.forms
        elif suffix not in optional:
            assert file is not None
            assert any(line.startswith(layer) for line in file.problems), name
        if suffix != "comfy_quant":
            for wrong in (replace(info, dtype="F64"), replace(info, shape=(*info.shape, 7))):
                file = runtime.recognize(infos | {name: wrong}, metadata, config)
                assert file is not None
                assert any(line.startswith(f"{layer}.") for line in file.problems), name
