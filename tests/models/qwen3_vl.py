"""Qwen3-VL, at last that of Qwen-Image 2.1: see tests/language_models.py."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

_shared = runpy.run_path(str(Path(__file__).parents[1] / "language_models.py"))
_config, tensors = _shared["text_config"], _shared["tensors"]

_CLASS, _HEAD = "Qwen3VLForConditionalGeneration", 32
CONFIGS: tuple[dict[str, Any], ...] = (
    _config(_CLASS, _HEAD),
    _config(_CLASS, _HEAD, tie_word_embeddings=False),
    _config(
        _CLASS,
        _HEAD,
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
    ),
)
REAL: dict[str, dict[str, Any]] = {}
INPUTS: dict[str, Any] = {}
CONVERTER = None
