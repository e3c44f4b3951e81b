"""nunchaku_lite: SVDQuant layers under the names of the model's own modules.

    <linear>.qweight, wscales, wtscale and wcscales (NVFP4), smooth_factor, proj_down, proj_up,
             bias (if the linear has one)
    <modulation>.qweight, wscales, wzeros, bias

q, k and v stand apart. Modulation rows are in natural order. Activations are never unsigned:
nothing is added behind a GELU. Keys must match exactly.

Source: diffusers/quantizers/nunchaku/utils.py, diffusers/quantizers/quantization_config.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dqconvert.formats import svdq
from dqconvert.formats.form import FileContext, PackedForm
from dqconvert.formats.layouts import Layout
from dqconvert.formats.loaders import TARGET, Loader, section_of
from dqconvert.formats.recognition import Infos, disagreements, layers_with, scheme_for
from dqconvert.formats.targets import Recognized
from dqconvert.quantizers.spec import QuantSpec, Scheme, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from dqconvert.quantizers.tensors import QuantizedTensor

NAME = "nunchaku_lite"

LAYOUT = svdq.Layout(
    smooth=("smooth_factor",),
    down="proj_down",
    up="proj_up",
    bias=False,
    scales=svdq.BOTH,
    modulation=False,
)


@dataclass(frozen=True, slots=True)
class Svdq:
    """SVDQuant's bytes as a Layout."""

    def problem(self, form: PackedForm) -> str | None:
        """See formats/layouts."""
        return svdq.problem(LAYOUT, form, 0.0)

    def promise(self, form: PackedForm) -> dict[str, TensorInfo]:
        """See formats/layouts."""
        return svdq.promise(LAYOUT, form)

    def pack(self, form: PackedForm, q: QuantizedTensor) -> dict[str, Tensor]:
        """See formats/layouts."""
        from dqconvert.formats import svdq_tensors

        return svdq_tensors.pack(LAYOUT, form, q)

    def unpack(self, form: PackedForm, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
        """See formats/layouts."""
        from dqconvert.formats import svdq_tensors

        return svdq_tensors.unpack(LAYOUT, form, tensors)


class NunchakuLite(Loader):
    """See the module docstring."""

    names = (NAME,)

    def layouts(self, scheme: Scheme) -> tuple[str, ...]:
        """SVDQuant alone."""
        return () if svdq.accepts(scheme) else self.names

    def layout(self, form: PackedForm) -> Layout:
        """There is one."""
        return Svdq()

    def activation(self, form: PackedForm, scheme: Scheme) -> QuantSpec | None:
        """Inputs of modulation linears stay in 16 bit."""
        return None if svdq.is_w4a16(form) else scheme.activation

    def metadata(self, context: FileContext) -> dict[str, str]:
        """The config is nobody else's."""
        return {"format": "pt"}

    def section(self, context: FileContext) -> dict[str, Any] | None:
        """Every packed module is named."""
        said: dict[str, Any] = {"quant_method": NAME, "compute_dtype": "bfloat16"}
        names = context.layers
        linears = [name for name, form in names.items() if not svdq.is_w4a16(form)]
        modulation = [name for name, form in names.items() if svdq.is_w4a16(form)]
        if linears:
            nvfp4 = svdq.is_nvfp4(context.scheme.weight)
            said["svdq_w4a4"] = {
                "precision": "nvfp4" if nvfp4 else "int4",
                "group_size": 16 if nvfp4 else 64,
                "rank": context.rank,
                "targets": linears,
            }
        if modulation:
            said["awq_w4a16"] = {"precision": "int4", "group_size": 64, "targets": modulation}
        return said

    def recognize(
        self, infos: Infos, metadata: Mapping[str, str], config: Mapping[str, Any]
    ) -> Recognized | None:
        """Folders whose config says so."""
        said = section_of(config, NAME)
        if said is None:
            return None
        w4a4, w4a16 = _part(said, "svdq_w4a4"), _part(said, "awq_w4a16")
        rank = w4a4.get("rank")
        read, problems = svdq.read_forms(LAYOUT, layers_with(infos, "qweight"), infos, rank)
        forms = {name: replace(form, layout=NAME) for name, form in read.items()}
        linears = {name: form for name, form in forms.items() if not svdq.is_w4a16(form)}
        problems += _target_problems("svdq_w4a4", w4a4, linears)
        problems += _target_problems("awq_w4a16", w4a16, forms.keys() - linears.keys())
        precisions = [_precision(form) for form in linears.values()]
        problems += disagreements("config svdq_w4a4.precision", w4a4.get("precision"), precisions)
        ranks = [form.rank for form in linears.values()]
        problems += disagreements("config svdq_w4a4.rank", rank, ranks)
        return Recognized(
            scheme=scheme_for(TARGET, linears.values()),
            rank=max(ranks, default=0),
            forms=forms,
            problems=tuple(problems),
        )


def _part(said: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = said.get(name)
    return section if isinstance(section, Mapping) else {}


def _target_problems(name: str, section: Mapping[str, Any], packed: Collection[str]) -> list[str]:
    listed = section.get("targets")
    targets = set(listed) if isinstance(listed, list) else set()
    lines = [f"{layer}: a target of {name} that is not packed" for layer in targets - set(packed)]
    lines += [f"{layer}: packed, but not a target of {name}" for layer in set(packed) - targets]
    return sorted(lines)


def _precision(form: PackedForm) -> str:
    return "nvfp4" if svdq.is_nvfp4(form.spec) else "int4"
