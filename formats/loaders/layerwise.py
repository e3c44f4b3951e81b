"""Layerwise casting: e4m3 storage without scales, computed in 16 bit.

    <layer>.weight F8_E4M3 [N, K], the weight cast as it is     <layer>.bias, as it was

from_pretrained casts every tensor to its `dtype`, so that the folder loads as a 16-bit model; the
call model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, ...) afterwards makes the
same e4m3 weights of it in memory, without another loss. Nothing is said in the config.

Source: diffusers/hooks/layerwise_casting.py, models/model_loading_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.formats.form import FileContext, PackedForm
from dqconvert.formats.layouts import Layout
from dqconvert.formats.layouts.scaled import Scaled
from dqconvert.formats.loaders import (
    TARGET,
    Loader,
    checked,
    is_plain,
    with_bias,
)
from dqconvert.formats.recognition import Infos, scheme_for
from dqconvert.formats.targets import Recognized
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.spec import Scheme

NAME = "layerwise"
PLAIN = ("weight", "bias")


class Layerwise(Loader):
    """See the module docstring."""

    names = (NAME,)

    def layouts(self, scheme: Scheme) -> tuple[str, ...]:
        """Plain casts alone."""
        return self.names if scheme.weight == schemes()["fp8-cast"].weight else ()

    def layout(self, form: PackedForm) -> Layout:
        """See Loader."""
        return Scaled()

    def problem(self, form: PackedForm) -> str | None:
        """See Loader."""
        if form.spec != schemes()["fp8-cast"].weight or form.input_scale:
            return "layerwise casting has no scales"
        return super().problem(form)

    def rows(self, form: PackedForm) -> bool:
        """Plain rows."""
        return True

    def section(self, context: FileContext) -> dict[str, Any] | None:
        """It is no quantizer."""
        return None

    def recognize(
        self, infos: Infos, metadata: Mapping[str, str], config: Mapping[str, Any]
    ) -> Recognized | None:
        """Model folders with e4m3 matrices and no scales at all."""
        cast = [
            name.removesuffix(".weight")
            for name, info in infos.items()
            if name.endswith(".weight") and info.dtype == "F8_E4M3" and len(info.shape) == 2
        ]
        parts = [name.rpartition(".") for name in infos]
        scaled = [leaf for layer, _, leaf in parts if layer in {*cast} and leaf not in PLAIN]
        if not cast or scaled or "scaled_fp8" in infos or "_class_name" not in config:
            return None
        if not is_plain(metadata, config):
            return None
        spec = schemes()["fp8-cast"].weight
        forms: dict[str, PackedForm] = {}
        problems: list[str] = []
        for layer in cast:
            shape = infos[f"{layer}.weight"].shape
            form = with_bias(PackedForm(spec, (shape[0], shape[1]), layout=NAME), layer, infos)
            forms[layer] = form
            problems += checked(self, layer, form, infos)
        return Recognized(scheme_for(TARGET, forms.values()), 0, forms, tuple(problems))
