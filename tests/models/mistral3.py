"""Mistral Small 3, at last that of FLUX.2: see tests/language_models.py."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

_shared = runpy.run_path(str(Path(__file__).parents[1] / "language_models.py"))
_config, tensors = _shared["text_config"], _shared["tensors"]

_CLASS, _HEAD = "Mistral3ForConditionalGeneration", 128
CONFIGS: tuple[dict[str, Any], ...] = (
    _config(_CLASS, _HEAD),
    _config(_CLASS, _HEAD, tie_word_embeddings=False),
    _config(
        _CLASS,
        _HEAD,
        vocab_size=131072,
        hidden_size=5120,
        intermediate_size=32768,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    ),
)
REAL: dict[str, dict[str, Any]] = {}
INPUTS: dict[str, Any] = {}
CONVERTER = None
