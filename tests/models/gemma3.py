"""Gemma 3, at last that of LTX-2: see tests/language_models.py."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

_shared = runpy.run_path(str(Path(__file__).parents[1] / "language_models.py"))
_config, tensors = _shared["text_config"], _shared["tensors"]

_CLASS, _HEAD = "Gemma3ForConditionalGeneration", 32
CONFIGS: tuple[dict[str, Any], ...] = (
    _config(_CLASS, _HEAD),
    _config(_CLASS, _HEAD, tie_word_embeddings=False),
    _config(
        _CLASS,
        _HEAD,
        vocab_size=262208,
        hidden_size=3840,
        intermediate_size=15360,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
    ),
)
REAL: dict[str, dict[str, Any]] = {}
INPUTS: dict[str, Any] = {}
CONVERTER = None
