"""The quantization_config of NVIDIA's Model Optimizer, as its export writes it. Torch-free.

Source: modelopt/torch/export/convert_hf_config.py (0.47).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

ARGUMENTS = {
    "FP8": {"dynamic": False, "num_bits": 8, "type": "float"},
    "NVFP4": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
}
"""What the weights and the inputs are rounded to, by algorithm; others have no groups."""


def modelopt_config(algorithm: str, ignore: Iterable[str]) -> dict[str, Any]:
    """algorithm: FP8, FP8_PER_CHANNEL_PER_TOKEN or NVFP4; ignore: modules that stay as they are."""
    said: dict[str, Any] = {}
    if algorithm in ARGUMENTS:
        arguments = ARGUMENTS[algorithm]
        group = {
            "input_activations": dict(arguments),
            "weights": dict(arguments),
            "targets": ["Linear"],
        }
        said["config_groups"] = {"group_0": group}
    return {**said, "ignore": list(ignore), "quant_algo": algorithm, "quant_method": "modelopt"}
