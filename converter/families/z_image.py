"""Z-Image (Turbo, Base, Edit, Omni), of any width and depth.

Names: diffusers/models/transformers/transformer_z_image.py, which LightX2V shares; original:
ComfyUI comfy/ldm/lumina/model.py; nunchaku: nunchaku/models/transformers/transformer_zimage.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqconvert.converter.family import EQUAL, Entry, Family, Infos, Linear, depth

_MODULATED, _PLAIN = ("noise_refiner", "layers"), ("context_refiner", "siglip_refiner")
_BLOCKS = tuple(f"{name}.{{i}}" for name in (*_MODULATED, *_PLAIN))
_PATCH = "2-1"
"""The patch size of every model so far: 2 x 2 pixels of 1 frame."""

_QKV = ("to_q", "to_k", "to_v")


def _linears(block: str) -> tuple[Linear, ...]:
    modulated = block.startswith(_MODULATED)
    qkv = f"{block}.attention.to_q"
    return (
        *([Linear(f"{block}.adaLN_modulation.0", "modulation", splits=4)] if modulated else []),
        *(Linear(f"{block}.attention.{name}", "attention", "qkv", qkv) for name in _QKV),
        Linear(f"{block}.attention.to_out.0", "attention", "attention_out"),
        *(
            Linear(f"{block}.feed_forward.{name}", "mlp", "mlp_in", f"{block}.feed_forward.w1")
            for name in ("w1", "w3")
        ),
        Linear(f"{block}.feed_forward.w2", "mlp", "mlp_out"),
    )


def _block(block: str) -> tuple[Entry, ...]:
    ours = f"{block}.attention"
    norms = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
    modulation = Entry(f"{block}.adaLN_modulation.0.*", (f"{block}.adaLN_modulation.0.*",))
    return (
        *([modulation] if block.startswith(_MODULATED) else []),
        Entry(f"{ours}.qkv.*", tuple(f"{ours}.{name}.*" for name in _QKV), bias=False),
        Entry(f"{ours}.out.*", (f"{ours}.to_out.0.*",), bias=False),
        Entry(f"{ours}.q_norm.weight", (f"{ours}.norm_q.weight",)),
        Entry(f"{ours}.k_norm.weight", (f"{ours}.norm_k.weight",)),
        *(
            Entry(f"{block}.feed_forward.{name}.*", (f"{block}.feed_forward.{name}.*",), bias=False)
            for name in ("w1", "w2", "w3")
        ),
        *(Entry(f"{block}.{name}.weight", (f"{block}.{name}.weight",)) for name in norms),
    )


_FINAL = f"all_final_layer.{_PATCH}"
_EMBEDDERS = ("t_embedder.mlp.0.*", "t_embedder.mlp.2.*", "cap_embedder.1.*", "siglip_embedder.1.*")
_TENSORS = (
    "cap_embedder.0.weight",
    "siglip_embedder.0.weight",
    "x_pad_token",
    "cap_pad_token",
    "siglip_pad_token",
)
_ORIGINAL = (
    Entry("x_embedder.*", (f"all_x_embedder.{_PATCH}.*",)),
    *(Entry(name, (name,)) for name in (*_EMBEDDERS, *_TENSORS)),
    *(entry for block in _BLOCKS for entry in _block(block)),
    Entry("final_layer.adaLN_modulation.1.*", (f"{_FINAL}.adaLN_modulation.1.*",)),
    Entry("final_layer.linear.*", (f"{_FINAL}.linear.*",)),
)


def _nunchaku(block: str, dense: bool) -> tuple[Entry, ...]:
    """Its feed-forward is diffusers' SwiGLU, which multiplies the first half with the second's."""
    ours = f"{block}.feed_forward"
    qkv = tuple(f"{block}.attention.{name}.*" for name in _QKV)
    return (
        *([] if dense else [Entry(f"{block}.attention.to_qkv.*", qkv, bias=False)]),
        Entry(f"{ours}.net.0.proj.*", (f"{ours}.w3.*", f"{ours}.w1.*"), bias=False, share=EQUAL),
        Entry(f"{ours}.net.2.*", (f"{ours}.w2.*",), bias=False),
    )


_REFINED = ("noise_refiner.{i}", "context_refiner.{i}")
_NUNCHAKU = tuple(entry for block in ("layers.{i}", *_REFINED) for entry in _nunchaku(block, False))
_SKIPPED = (
    *_nunchaku("layers.{i}", False),
    *(entry for block in _REFINED for entry in _nunchaku(block, True)),
)


def _config_of(infos: Infos) -> dict[str, Any]:
    """The ZImageTransformer2DModel config that the shapes imply."""
    dim, patch = infos[f"all_x_embedder.{_PATCH}.weight"].shape
    head = infos["layers.0.attention.norm_q.weight"].shape[0]
    siglip = infos.get("siglip_embedder.0.weight")
    return {
        "_class_name": "ZImageTransformer2DModel",
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        "in_channels": patch // 4,
        "dim": dim,
        "n_layers": depth(infos, "layers"),
        "n_refiner_layers": depth(infos, "noise_refiner"),
        "n_heads": dim // head,
        "n_kv_heads": dim // head,
        "norm_eps": 1e-5,
        "qk_norm": True,
        "cap_feat_dim": infos["cap_embedder.0.weight"].shape[0],
        "siglip_feat_dim": siglip.shape[0] if siglip else None,
        "rope_theta": 256.0,
        "t_scale": 1000.0,
        "axes_dims": [head // 4, head * 3 // 8, head * 3 // 8],
        "axes_lens": [1024, 512, 512],
    }


def _facts(dialect: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """nunchaku's class name."""
    written = dialect.startswith("nunchaku")
    return {"model_class": "NunchakuZImageTransformer2DModel"} if written else {}


def _variant(infos: Infos, config: Mapping[str, Any]) -> str:
    return "omni" if "siglip_embedder.0.weight" in infos else ""


_KEPT = {"modulation": None}
_REFINERS = dict.fromkeys(
    linear.name for block in _BLOCKS if "refiner" in block for linear in _linears(block)
)

FAMILY = Family(
    name="z_image",
    title="Z-Image",
    aliases={
        "z-image-turbo": "Tongyi-MAI/Z-Image-Turbo",
        "z-image": "Tongyi-MAI/Z-Image",
    },
    licenses={"z-image-turbo": "apache-2.0", "z-image": "apache-2.0"},
    architecture="lumina2",
    classes=("ZImageTransformer2DModel",),
    signature=(
        f"all_x_embedder.{_PATCH}.weight",
        f"{_FINAL}.linear.weight",
        "cap_embedder.1.weight",
        "cap_pad_token",
        "layers.0.attention.to_q.weight",
        "layers.0.feed_forward.w3.weight",
        "noise_refiner.0.attention.to_q.weight",
        "context_refiner.0.attention.to_q.weight",
    ),
    hidden=f"all_x_embedder.{_PATCH}.weight",
    optional=("siglip_embedder", "siglip_refiner", "siglip_pad_token"),
    blocks=("noise_refiner", "context_refiner", "siglip_refiner", "layers"),
    linears=(
        *(linear for block in _BLOCKS for linear in _linears(block)),
        Linear(f"{_FINAL}.adaLN_modulation.1", "final", splits=1),
        Linear(f"{_FINAL}.linear", "final"),
    ),
    dialects={
        "diffusers": (),
        "original": _ORIGINAL,
        "lightx2v": (),
        "nunchaku": _NUNCHAKU,
        "nunchaku-skip-refiners": _SKIPPED,
    },
    layouts={"nunchaku": ("v2", "skip-refiners")},
    unread=("norm_final.weight",),  # of Lumina 2, which Z-Image descends from
    config_of=_config_of,
    facts=_facts,
    policies={
        "lightx2v": {"modulation": "weight", "final": "weight"},
        # 2 % of the weights, 256 wide, and most converters keep them.
        "comfyui": _KEPT,
        "gguf": _REFINERS,  # as lcpp.patch of ComfyUI-GGUF
        "diffusers": _KEPT,
        "sglang": _KEPT,
        "vllm": _KEPT,
        # Its class leaves modulation as it is, and knows no refiner of images.
        "nunchaku": _KEPT | dict.fromkeys(one.name for one in _linears("siglip_refiner.{i}")),
        "skip-refiners": _REFINERS,
    },
    sensitive=tuple(f"{block}.attention.to_out.0" for block in _BLOCKS),
    unguided=("turbo",),
    variant=_variant,
    pipelines={"": "ZImagePipeline", "omni": "ZImageOmniPipeline"},
    encoders={"text_encoder": "qwen3"},
    # No folds: norms have a scale without a shift, and linears have no bias.
)
