"""BFL: fp8r and NVFP4 in a single file, for from_single_file with BFLQuantizationConfig.

    fp8r    <layer>.weight F8_E4M3 [N, K]   weight_scale F32 [N]
    nvfp4   <layer>.weight U8 [N, K/2]      low nibble first
            <layer>.weight_scale F8_E4M3 [N, K/16]   weight_scale_2 F32 []   input_scale F32 []

A linear is quantized where its weight has scales, so nothing is said in a config; the plain config
of the model lies beside the file, for `config=`. NVFP4 without an input_scale does not load.
diffusers names are read as they are.

Source: diffusers/quantizers/bfl (bfl_quantizer.py, utils.py), loaders/single_file_model.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.formats.form import FileContext, PackedForm
from dqconvert.formats.layouts import Layout
from dqconvert.formats.layouts.blocked import BlockScaled
from dqconvert.formats.layouts.scaled import Scaled
from dqconvert.formats.loaders import (
    TARGET,
    Loader,
    checked,
    is_plain,
    with_bias,
)
from dqconvert.formats.recognition import Infos, describe, layers_with, scheme_for
from dqconvert.formats.targets import Recognized
from dqconvert.quantizers.schemes.blocks import NVFP4
from dqconvert.quantizers.schemes.plain8 import FP8_ROW
from dqconvert.quantizers.spec import Scheme

NAME = "bfl"
SPECS = (FP8_ROW, NVFP4)


class Bfl(Loader):
    """See the module docstring."""

    names = (NAME,)

    def layouts(self, scheme: Scheme) -> tuple[str, ...]:
        """Inputs are quantized like the weights."""
        plain = scheme.activation == scheme.weight and not scheme.steps
        return self.names if plain and scheme.weight in SPECS else ()

    def static(self, scheme: Scheme, layout: str) -> str:
        """See formats/targets."""
        return "required" if scheme.weight == NVFP4 else "never"

    def layout(self, form: PackedForm) -> Layout:
        """See Loader."""
        if form.spec == NVFP4:
            return BlockScaled(tensor_scale="weight_scale_2", input_scale="input_scale")
        return Scaled(column=False)

    def problem(self, form: PackedForm) -> str | None:
        """See Loader."""
        if form.spec not in SPECS:
            return f"the loader reads e4m3 rows and NVFP4, not {form.spec.code}"
        if form.input_scale != (form.spec == NVFP4):
            return "NVFP4 needs a static scale of the input, and e4m3 rows have none"
        return super().problem(form)

    def rows(self, form: PackedForm) -> bool:
        """Plain rows."""
        return True

    def filename(self, context: FileContext) -> str:
        """Nothing looks for a name."""
        return f"{context.model}-{context.scheme.name}.safetensors"

    def section(self, context: FileContext) -> dict[str, Any] | None:
        """A folder with a quant_method of bfl does not load."""
        return None

    def recognize(
        self, infos: Infos, metadata: Mapping[str, str], config: Mapping[str, Any]
    ) -> Recognized | None:
        """Files whose weights have these scales and no word of another runtime."""
        scaled = layers_with(infos, "weight_scale")
        if not scaled or not is_plain(metadata, config):
            return None
        if not any(_is_ours(layer, infos) for layer in scaled):
            return None
        forms: dict[str, PackedForm] = {}
        problems: list[str] = []
        others = ("weight_scale_2", "input_scale")
        for layer in dict.fromkeys(
            [*scaled, *(x for name in others for x in layers_with(infos, name))]
        ):
            weight = infos.get(f"{layer}.weight")
            if weight is None or len(weight.shape) != 2:
                what = "missing" if weight is None else f"found {describe(weight)}"
                problems.append(f"{layer}.weight: {what}")
                continue
            form = _form(layer, infos)
            forms[layer] = form
            problems += checked(self, layer, form, infos)
        plain = [name.removesuffix(".weight") for name in infos if name.endswith(".weight")]
        for layer in plain:
            if layer not in forms and infos[f"{layer}.weight"].dtype in ("F8_E4M3", "U8"):
                problems.append(f"{layer}.weight_scale: missing")
        return Recognized(scheme_for(TARGET, forms.values()), 0, forms, tuple(problems))


def _is_ours(layer: str, infos: Infos) -> bool:
    """Whether a layer is fp8r, or NVFP4 with the scale of its input, in a file without markers."""
    if f"{layer}.comfy_quant" in infos:
        return False
    weight, scale = infos.get(f"{layer}.weight"), infos[f"{layer}.weight_scale"]
    if weight is None:
        return False
    if weight.dtype == "U8":
        return f"{layer}.weight_scale_2" in infos and f"{layer}.input_scale" in infos
    return weight.dtype == "F8_E4M3" and scale.shape == weight.shape[:1]


def _form(layer: str, infos: Infos) -> PackedForm:
    n, k = infos[f"{layer}.weight"].shape
    blocks = infos[f"{layer}.weight"].dtype == "U8" or f"{layer}.weight_scale_2" in infos
    shape = (n, 2 * k) if blocks else (n, k)
    spec = NVFP4 if blocks else FP8_ROW
    return with_bias(PackedForm(spec, shape, input_scale=blocks, layout=NAME), layer, infos)
