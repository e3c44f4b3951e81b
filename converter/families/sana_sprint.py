"""SANA-Sprint (0.6B, 1.6B): SANA that is told how strong guidance is, in one to four steps.

Names: diffusers/models/transformers/sana_transformer.py; original: NVlabs/Sana, by
scripts/convert_sana_to_diffusers.py of diffusers, where one name stands for another module than in
SANA.
"""

from __future__ import annotations

from dqconvert.converter.families import sana
from dqconvert.converter.family import Family

_TIME = "time_embed.timestep_embedder"
_HUB = "Efficient-Large-Model"
FAMILY = Family(
    name="sana_sprint",
    title="SANA-Sprint",
    aliases={
        "sana-sprint-0.6b": f"{_HUB}/Sana_Sprint_0.6B_1024px_diffusers",
        "sana-sprint-1.6b": f"{_HUB}/Sana_Sprint_1.6B_1024px_diffusers",
    },
    licenses={},
    classes=("SanaTransformer2DModel",),
    signature=(*sana.SIGNATURE, f"{_TIME}.linear_1.weight", f"{sana.GUIDANCE}.linear_1.weight"),
    hidden="patch_embed.proj.weight",
    optional=(f"{sana.SELF}.norm_", f"{sana.CROSS}.norm_"),
    blocks=("transformer_blocks",),
    linears=sana.LINEARS,
    dialects={"diffusers": (), "original": sana.original(_TIME)},
    unread=sana.UNREAD,
    config_of=sana.config_of,
    assumed=sana.ASSUMED,
    facts=sana.facts,
    sensitive=(f"{sana.SELF}.to_out.0", f"{sana.CROSS}.to_out.0"),
    folds=sana.FOLDS,
    unrun=("comfyui", "sglang", "vllm"),
    pipelines={"": "SanaSprintPipeline"},
    fields=("prompt",),
    encoders={"text_encoder": "gemma2"},
)
