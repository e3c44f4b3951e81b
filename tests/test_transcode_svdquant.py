"""FLUX.1's two namings for nunchaku: version 1's, and what the Python class makes of it on load."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)
transcode = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).with_name("test_transcode.py")), run_name="transcode")
)
done = transcode.done

RENAMED = {
    "single_transformer_blocks.": {
        ".qkv_proj.": ".attn.to_qkv.",
        ".out_proj.": ".attn.to_out.",
        ".norm_k.": ".attn.norm_k.",
        ".norm_q.": ".attn.norm_q.",
    },
    "transformer_blocks.": {
        ".mlp_context_fc1.": ".ff_context.net.0.proj.",
        ".mlp_context_fc2.": ".ff_context.net.2.",
        ".mlp_fc1.": ".ff.net.0.proj.",
        ".mlp_fc2.": ".ff.net.2.",
        ".qkv_proj_context.": ".attn.add_qkv_proj.",
        ".qkv_proj.": ".attn.to_qkv.",
        ".norm_k.": ".attn.norm_k.",
        ".norm_q.": ".attn.norm_q.",
        ".norm_added_k.": ".attn.norm_added_k.",
        ".norm_added_q.": ".attn.norm_added_q.",
        ".out_proj_context.": ".attn.to_add_out.",
        ".out_proj.": ".attn.to_out.0.",
    },
}
"""What transformer_flux_v2.py replaces in names on load, by the list of blocks."""

PARTS = {
    ".lora_down": ".proj_down",
    ".lora_up": ".proj_up",
    ".smooth_orig": ".smooth_factor_orig",
    ".smooth": ".smooth_factor",
}


def loaded(name: str) -> str:
    """A name of version 1 as the class of version 2 calls it."""
    blocks = next((one for one in RENAMED if name.startswith(one)), None)
    if blocks is None:
        return name
    for old, new in RENAMED[blocks].items():
        name = name.replace(old, new)
    stem, _, last = name.rpartition(".")
    return stem + PARTS.get(f".{last}", f".{last}")


@pytest.mark.parametrize("scheme", ["svdquant-w4a4", "svdquant-nvfp4"])
def test_version_2_names_of_flux_lead_there_and_back(
    shop: Any, tmp_path: Path, scheme: str
) -> None:
    first = shop.output((scheme, "nunchaku"), "--rank", 16)
    second, back = tmp_path / "second", tmp_path / "back"
    words = ("--target", "nunchaku", "-q", "-o")
    done("transcode", first, "--layout", "v2-flux", *words, second)
    one, two = transcode.tensors_of(first), transcode.tensors_of(second)
    needed: dict[str, Tensor] = {loaded(name): tensor for name, tensor in one.items()}
    assert two.keys() == needed.keys()
    assert all(transcode.same_bits(two[name], needed[name]) for name in two)
    done("verify", second, "--against", shop.model)
    done("transcode", second, "--layout", "v1", *words, back)
    assert not transcode.different(back, first)
    direct = tmp_path / "direct"
    done(shop.model, "--scheme", scheme, "--layout", "v2-flux", "--rank", "16", *words, direct)
    assert transcode.tensors_of(direct).keys() == two.keys()
