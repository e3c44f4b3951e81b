"""nunchaku_lite: diffusers' own classes take what is written, of every family."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from dqconvert.converter.detect import open_canonical
from dqconvert.converter.options import PlanOptions, runs
from dqconvert.converter.plan import Plan, make_plan
from dqconvert.formats.targets import target
from dqconvert.quantizers.errors import PlanError
from dqconvert.quantizers.schemes import schemes

HERE = Path(__file__).parent
checkpoints = SimpleNamespace(**runpy.run_path(str(HERE / "checkpoints.py")))
samples = SimpleNamespace(**runpy.run_path(str(HERE / "samples.py")))
result_of, context_of, infos_of = samples.result_of, samples.context_of, samples.infos_of
DIFFUSERS = target("diffusers")
MODELS = {
    f"{name}-{number}": config
    for name, known in checkpoints.CONFIGS.items()
    for number, config in enumerate(known)
    if checkpoints.small(config)
    and not name.startswith("sana")
    and config.get("_class_name") not in checkpoints.ENCODERS
    and "tensors" not in checkpoints.FAMILY_MODELS.get(name, {})
}
"""Small models of diffusers' classes, of every family but SANA, whose width no kernel reads."""


@pytest.fixture(scope="module")
def lite() -> Iterator[ModuleType]:
    """diffusers' module of quantized linears, read with a stand-in for its package of kernels."""
    diffusers = pytest.importorskip("diffusers")
    name = "diffusers.quantizers.nunchaku.utils"
    with pytest.MonkeyPatch.context() as patch:
        stub = ModuleType("kernels")
        patch.setattr(stub, "get_kernel", lambda *_, **__: SimpleNamespace(ops=None), raising=False)
        patch.setitem(sys.modules, "kernels", stub)
        patch.setattr(diffusers.utils, "is_kernels_available", lambda: True)
        patch.setattr(diffusers.utils, "is_kernels_version", lambda *_: True)
        patch.setattr("diffusers.utils.constants.DIFFUSERS_TRUST_REMOTE_KERNELS", True)
        patch.delitem(sys.modules, name, raising=False)
        __import__(name)
    yield sys.modules[name]
    sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["svdquant-w4a4", "svdquant-nvfp4"])
def test_diffusers_loads_every_tensor(lite: ModuleType, name: str) -> None:
    """Its config class accepts the config, its linears take the tensors strictly."""
    from diffusers import NunchakuLiteQuantizationConfig

    runtime, scheme = target("diffusers"), schemes()[name]
    context, infos = context_of(runtime, scheme)
    written = runtime.config(context)
    assert written is not None
    assert written["_class_name"] == "FluxTransformer2DModel"
    config = NunchakuLiteQuantizationConfig.from_dict(written["quantization_config"])
    assert config.to_dict()["compute_dtype"] == "bfloat16"

    model = torch.nn.Module()
    model.transformer_blocks = torch.nn.ModuleDict()
    model.norm = torch.nn.RMSNorm(8)
    state = {"norm.weight": torch.ones(8)}
    for layer, form in context.layers.items():
        _, block, _ = layer.split(".")
        linear = torch.nn.Linear(form.shape[1], form.shape[0], bias=form.bias)
        model.transformer_blocks[block] = torch.nn.ModuleDict({"linear": linear})
        packed = runtime.pack(form, result_of(form, True))
        state |= {f"{layer}.{suffix}": tensor for suffix, tensor in packed.items()}
    replaced = lite.replace_with_nunchaku_linear(model, config.to_dict(), torch.bfloat16)
    assert replaced == len(context.layers)
    lite.check_strict_state_dict_match(model, state)
    theirs = infos_of({k: t for k, t in model.state_dict().items() if k != "norm.weight"})
    assert theirs == {key: info for key, info in infos.items() if key != "norm.weight"}
    model.load_state_dict(state, strict=True, assign=True)


def plan_of(config: Any, scheme: str) -> Plan:
    """A plan that leaves out what the kernels cannot hold, which the small models have some of."""
    source = open_canonical(checkpoints.Memory(checkpoints.meta_model(config)), Path("memory"))
    assert runs(DIFFUSERS, source.family)
    options = {"layout": "nunchaku_lite"}
    try:
        return make_plan(
            source, DIFFUSERS, schemes()[scheme], PlanOptions(**options), ("m", config)
        )
    except PlanError as error:
        assert all("multiples of" in problem for problem in error.problems)
        keep = "|".join(f"^{problem.split(':')[0]}$" for problem in error.problems)
        found = PlanOptions(**options, keep=keep)
        return make_plan(source, DIFFUSERS, schemes()[scheme], found, ("m", config))


@pytest.mark.parametrize("name", MODELS)
def test_diffusers_classes_have_the_tensors_of_every_family(lite: ModuleType, name: str) -> None:
    config = MODELS[name]
    scheme = "svdquant-nvfp4" if name.endswith("-1") else "svdquant-w4a4"
    plan = plan_of(config, scheme)
    written = DIFFUSERS.config(plan.context)
    assert written is not None
    with torch.device("meta"):
        model = checkpoints.build_model(config).to(torch.bfloat16)
    section = written["quantization_config"]
    replaced = lite.replace_with_nunchaku_linear(model, section, torch.bfloat16)
    assert replaced == len(plan.context.layers) > 0
    assert infos_of(model.state_dict()) == dict(plan.outputs)
