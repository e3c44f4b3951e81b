"""ggml's block types, alone and in the mixes of the files in circulation; 16 bit in the runtime.

The mixes are those of lcpp.patch of ComfyUI-GGUF (llama.cpp b3962): what a file type gives to
value projections, to fused qkv, and to the feed-forward's output. Names that none of its parts
fits, FLUX.1's feed-forwards among them, get the base type.
"""

from __future__ import annotations

from collections.abc import Mapping

from dqconvert.quantizers.spec import ALL, BLOCKS, Mix, QuantSpec, Scheme

PREFIX = "gguf-"
VALUES = (
    "attn_v.weight",
    ".to_v.weight",
    ".v.weight",
    ".attn.w1v.weight",
    ".attn.w2v.weight",
    "_attn.v_proj.weight",
)
FUSED = ("attn_qkv.weight", "attn.qkv.weight", "attention.qkv.weight")
DOWN = (
    "ffn_down",
    "experts.*.w2.weight",
    ".ffn.2.weight",
    ".ff.net.2.weight",
    ".mlp.layer2.weight",
    ".adaln_modulation_mlp.2.weight",
    ".feed_forward.w2.weight",
)

MIXES: Mapping[str, tuple[Mix, ...]] = {
    "q2_k": (Mix(VALUES, "gguf-q3_k"),),
    "q3_k_s": (),
    "q3_k_m": (
        Mix(VALUES, "gguf-q5_k", first=2),
        Mix(VALUES, "gguf-q4_k"),
        Mix(FUSED, "gguf-q4_k"),
        Mix(DOWN, "gguf-q4_k"),
    ),
    "q3_k_l": (
        Mix(VALUES, "gguf-q5_k"),
        Mix(FUSED, "gguf-q4_k"),
        Mix(DOWN, "gguf-q5_k"),
    ),
    "q4_0": (Mix(DOWN, "gguf-q4_1"),),
    "q4_k_s": (Mix(VALUES, "gguf-q5_k", first=4), Mix(DOWN, "gguf-q5_k")),
    "q4_k_m": (
        Mix(VALUES, "gguf-q6_k"),
        Mix(FUSED, "gguf-q5_k"),
        Mix(DOWN, "gguf-q6_k"),
    ),
    "q5_0": (Mix(DOWN, "gguf-q5_1"),),
    "q5_k_s": (),
    "q5_k_m": (
        Mix(VALUES, "gguf-q6_k"),
        Mix(FUSED, "gguf-q6_k"),
        Mix(DOWN, "gguf-q6_k"),
    ),
}
"""By file type. Of q2_k, q4_0 and q5_0 there is a pure form too, as a layout of the target."""

MENU = (
    *("q2_k", "q3_k", "iq4_xs", "q4_k", "q4_1", "q5_k", "q5_1", "q6_k", "q8_0"),
    *("iq4_nl", "q5_0"),  # in the place of Q4_K and Q5_K, where 256 does not divide a width
)
"""What a mix by measured errors is made of, of types of one size the first that a layer can have.

Every reader decodes them fast, which cannot be said of the types between Q2_K and IQ4_XS but Q3_K.
"""

AUTO = "gguf-auto"


def block_spec(code: str) -> QuantSpec:
    """The weight format of a block type, or of f16 and bf16."""
    if code.upper() in BLOCKS:
        return QuantSpec(code, (1, BLOCKS[code.upper()][0]), unit=True)
    return QuantSpec(code, (1, ALL), unit=True)


def _scheme(name: str, summary: str, code: str) -> Scheme:
    return Scheme(
        name=f"{PREFIX}{name}",
        summary=summary,
        weight=block_spec(code),
        activation=None,
        targets=("gguf",),
        rounding="gptq",
        data_free="mse",
        mixes=MIXES.get(name, ()),
        menu=tuple(f"{PREFIX}{one}" for one in MENU) if name == "auto" else (),
    )


def _bits(code: str) -> str:
    weights, size = BLOCKS[code.upper()]
    return f"{8 * size / weights:.4g} bits"


def _base(name: str) -> str:
    """The type that a file type gives to most layers."""
    return name.removesuffix("_s").removesuffix("_m").removesuffix("_l")


def _better(name: str) -> str:
    """What the summary of a mix says of it."""
    return ", sensitive layers better" if MIXES.get(name) else ""


SCHEMES = (
    _scheme("f16", "fp16", "f16"),
    _scheme("bf16", "bf16", "bf16"),
    *(
        _scheme(code, f"ggml's {code.upper()}, {_bits(code)}{_better(code)}", code)
        for code in (dtype.lower() for dtype in BLOCKS)
    ),
    *(
        _scheme(
            name,
            f"{_base(name).upper()}{_better(name) or ' throughout'}",
            _base(name),
        )
        for name in MIXES
        if name.upper() not in BLOCKS
    ),
    _scheme("auto", "each layer the type that errs least for --bits in all", "q4_k"),
)
