"""Gemma 2, at last that of SANA: see tests/language_models.py."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

_shared = runpy.run_path(str(Path(__file__).parents[1] / "language_models.py"))
_config, tensors = _shared["text_config"], _shared["tensors"]

_CLASS, _HEAD = "Gemma2ForCausalLM", 256
CONFIGS: tuple[dict[str, Any], ...] = (
    _config(_CLASS, _HEAD),
    _config(_CLASS, _HEAD, tie_word_embeddings=False),
    _config(
        _CLASS,
        _HEAD,
        vocab_size=256000,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
    ),
)
REAL: dict[str, dict[str, Any]] = {}
INPUTS: dict[str, Any] = {}
CONVERTER = None
