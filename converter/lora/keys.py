"""What the keys of LoRA files say: of which module, and which part of its adapter. Torch-free.

    kohya, LightX2V     X.lora_down.weight, X.lora_up.weight, X.lora_mid.weight, X.alpha
    PEFT, diffusers     X.lora_A.weight, X.lora_B.weight, X.lora_B.bias; a word of the adapter's
                        name such as .default may stand before .weight; X.lora_A without an end
    diffusers, older    X.lora.down.weight, X_lora.down.weight, X.lora_linear_layer.down.weight
    xlabs               X.down.weight, X.up.weight
    LyCORIS             X.lokr_w1 (_a, _b), X.lokr_w2 (_a, _b), X.lokr_t2, X.hada_w1_a .. w2_b,
                        X.hada_t1, X.hada_t2, X.w_norm, X.b_norm
    DoRA                X.dora_scale, X.lora_magnitude_vector
    differences         X.diff, X.diff_b (bias), X.diff_m (modulation), X.set_weight

Sources: comfy/lora.py and comfy/weight_adapter, LightX2V lightx2v/utils/lora_loader.py, PEFT
utils/save_and_load.py, diffusers loaders/lora_conversion_utils.py.
"""

from __future__ import annotations

import re

from dqconvert.quantizers.adapters import HADA, LOKR

_NAMED = r"(?:\.(?!weight$|bias$)[\w-]+)?(?:\.weight)?"
"""The end of a PEFT key: the adapter's name or none, .weight or none."""

ROLES: tuple[tuple[str, str], ...] = (
    (rf"\.lora_A{_NAMED}", "down"),
    (rf"\.lora_B{_NAMED}", "up"),
    (r"\.lora_A(?:\.[\w-]+)?\.bias", "down_bias"),
    (r"\.lora_B(?:\.[\w-]+)?\.bias", "up_bias"),
    (rf"\.lora_down{_NAMED}", "down"),
    (rf"\.lora_up{_NAMED}", "up"),
    (r"\.lora_down\.bias", "down_bias"),
    (r"\.lora_up\.bias", "up_bias"),
    (rf"\.lora_mid{_NAMED}", "mid"),
    (r"(?:[._]lora|\.lora_linear_layer)\.down\.weight", "down"),
    (r"(?:[._]lora|\.lora_linear_layer)\.up\.weight", "up"),
    (r"\.down\.weight", "down"),
    (r"\.up\.weight", "up"),
    (r"\.(?:lora_)?alpha", "alpha"),
    (r"\.dora_scale", "magnitude"),
    (rf"\.lora_magnitude_vector{_NAMED}", "magnitude"),
    (r"\.(?:diff|w_norm)", "diff"),
    (r"\.(?:diff_b|b_norm)", "diff_b"),
    (r"\.diff_m", "diff_m"),
    (r"\.set_weight", "set"),
    *((rf"\.{word}{_NAMED}", word) for word in (*LOKR, *HADA)),
)
"""How a key ends, as an expression, and what the tensor is; the first that fits."""

_ROLES = tuple((re.compile(rf"(.+?){ending}"), role) for ending, role in ROLES)

TEXT = re.compile(
    r"(?:lora_te(\d?)_|te(\d)\.|(?:text_encoders\.)?(clip_[lg]|t5xxl)\.|text_encoders?(?:_(\d))?\.)"
)
"""How the keys of text encoders begin; a number is that of the encoder in the pipeline."""

CALLED = {"clip_l": 1, "clip_g": 2, "t5xxl": 3}
"""Encoders that ComfyUI calls by name, where they stand in the pipeline that has them all; T5 is
the last one also of shorter ones."""

SECOND = "transformer_2."
"""How the keys of Wan 2.2's second expert begin, where a file holds both."""

FLAT = re.compile(r"lora_(?:(?:prior_)?unet|transformer|te\d?)_+|lycoris_")
"""What stands before a module's name whose dots are underscores; twice one in VideoX-Fun's files.
"""

PREFIXES = (
    "base_model.",
    "model.",
    "diffusion_model.",
    "transformer.",
    "transformer_2.",
    "unet.",
    "module.",
    "net.",
)
"""What may stand before a module's name, in any order."""

ENCODER_PREFIXES = re.compile(
    r"text_encoders\.\w+\.transformer\.|text_encoders?(?:_\d)?\.|te\d\.|clip_[lg]\.|t5xxl\."
)
"""The same of text encoders, before which ComfyUI's may have a name of their own."""


def parse(key: str) -> tuple[str, str] | None:
    """The module as the file calls it, and the role of the tensor; None for other keys."""
    for expression, role in _ROLES:
        found = expression.fullmatch(key)
        if found is not None:
            return found[1], role
    return None


def encoder_of(key: str) -> int | None:
    """Of which of the pipeline's text encoders a key is, from 1; None where it is of none."""
    found = TEXT.match(key)
    if found is None:
        return None
    return CALLED.get(found[3] or "") or int(found[1] or found[2] or found[4] or 1)
