"""The quantization_config of compressed-tensors, and the layouts of its formats. Torch-free.

Source: compressed_tensors/quantization/quant_scheme.py (presets), quant_config.py, and
compressors/*/base.py (0.20).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dqconvert.formats.layouts import Layout
from dqconvert.formats.layouts.blocked import BlockScaled
from dqconvert.formats.layouts.grouped import PackQuantized
from dqconvert.formats.layouts.scaled import Scaled
from dqconvert.quantizers.spec import QuantSpec

METHOD = "compressed-tensors"

LAYOUTS: Mapping[str, Layout] = {
    "int8": Scaled(),
    "fp8": Scaled(),
    "fp8-block128": Scaled(),
    "nvfp4": BlockScaled(
        weight="weight_packed",
        tensor_scale="weight_global_scale",
        input_scale="input_global_scale",
        divisors=True,
        one=(1,),
    ),
    "mxfp8": BlockScaled(codes="F8_E4M3", scales="U8"),
    "mxfp4": BlockScaled(weight="weight_packed", scales="U8"),
    "w4a16": PackQuantized(),
}
"""Layout of each kind of format."""

FORMATS = {
    "int8": "int-quantized",
    "fp8": "float-quantized",
    "fp8-block128": "float-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp8": "mxfp8-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "w4a16": "pack-quantized",
}

_TOKEN = {"strategy": "token", "dynamic": True}
_BYTES = {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
_BLOCK32 = {"strategy": "group", "group_size": 32, **_BYTES}
_BLOCK16 = {
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": "torch.float8_e4m3fn",
    "zp_dtype": "torch.float8_e4m3fn",
}

_ARGUMENTS: Mapping[str, tuple[int, str, dict[str, Any], dict[str, Any] | None]] = {
    "int8": (8, "int", {"strategy": "channel"}, _TOKEN),
    "fp8": (8, "float", {"strategy": "channel"}, _TOKEN),
    "fp8-block128": (
        8,
        "float",
        {"strategy": "block", "block_structure": [128, 128]},
        {"strategy": "group", "group_size": 128, "dynamic": True},
    ),
    "nvfp4": (4, "float", _BLOCK16, {**_BLOCK16, "dynamic": "local"}),
    "mxfp8": (8, "float", _BLOCK32, {**_BLOCK32, "dynamic": True}),
    "mxfp4": (4, "float", _BLOCK32, {**_BLOCK32, "dynamic": True}),
    "w4a16": (4, "int", {"strategy": "group"}, None),
}
"""Bits, type, and what else is said of the weights and of the inputs, of each kind of format."""


def compressed_config(kind: str, spec: QuantSpec, ignore: Iterable[str]) -> dict[str, Any]:
    """kind: a key of FORMATS; ignore: modules that stay as they are, by their whole names."""
    bits, code, weights, inputs = _ARGUMENTS[kind]
    common = {"num_bits": bits, "type": code, "symmetric": not spec.zero_point, "dynamic": False}
    if kind == "w4a16":
        weights = {**weights, "group_size": spec.tile[1]}
    group = {
        "targets": ["Linear"],
        "weights": {**common, **weights},
        "input_activations": None if inputs is None else {**common, **inputs},
        "output_activations": None,
    }
    return {
        "quant_method": METHOD,
        "format": FORMATS[kind],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
    }


def kind_said(said: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """The kind of format that a quantization_config speaks of, and its weights' arguments.

    None for formats that are not written here, and for several groups.
    """
    groups = said.get("config_groups")
    if said.get("quant_method") != METHOD or not isinstance(groups, Mapping) or len(groups) != 1:
        return None
    group = next(iter(groups.values()))
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        return None
    for kind, (bits, code, needed, _) in _ARGUMENTS.items():
        shape = {k: v for k, v in needed.items() if k in ("strategy", "block_structure")}
        wanted = {"num_bits": bits, "type": code, **shape}
        fits = all(weights.get(key) == value for key, value in wanted.items())
        if fits and FORMATS[kind] == said.get("format"):
            return kind, weights
    return None
