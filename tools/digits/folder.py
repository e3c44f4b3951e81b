"""The model folder on disk: a whole small FluxPipeline, with prompts, card and planting.

Contract: tensors of two or more dimensions are stored in bf16, vectors (biases, norms) in fp32, and
the configs say float32, so every loader computes in fp32. `round_weights` applies the same rounding
in memory, so that what is measured is what is stored. `write_untouched` copies a folder and takes
the planting out of its transformer: the same function without the outliers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from digits import plant
from digits.flow import build_scheduler
from digits.text import TextParts
from digits.words import calibration_prompts

DEFAULT = Path(__file__).resolve().parents[2] / "converter" / "data" / "flux-digits"
WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"
PLANTING = "planting.json"

CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# flux-digits

A FLUX pipeline in miniature that draws 32x32 handwritten digits. It exists to exercise and measure
quantization without a network, a GPU or gated weights.

```python
pipe = FluxPipeline.from_pretrained("flux-digits")
pipe("a handwritten seven", height=32, width=32, num_inference_steps=12, max_sequence_length=16)
```

* **Parts**: diffusers' `FluxPipeline` with a `FluxTransformer2DModel` (one double and three single
  blocks, two heads of 128, 5.7 M parameters), an `AutoencoderKL` (32x32x3 to 8x8x4), a one-layer
  CLIP text model and a one-layer T5 encoder, both 64 wide, each with a small tokenizer. Weights are
  bf16, biases and norms fp32.
* **Data**: scikit-learn's `load_digits` (1797 images of 8x8, UCI optical recognition of handwritten
  digits), enlarged to 32x32. Prompts come from a small English grammar ("the digit 7", "number
  seven, handwritten", ...); the empty prompt means any digit.
* **Training**: from scratch on one CPU core in under 20 minutes by `python tools/train_digits.py`;
  rectified flow, AdamW, EMA, fixed seeds.
* **Outliers**: trained small models have no extreme channels, large ones do. `planting.json`
  records an exact change of variables (powers of two and constant offsets on the modulated and the
  value channels, `tools/digits/plant.py`) that is in these weights and does not change the
  function. The outliers behind the GELUs are learnt: two per cent of the first MLP rows started
  eight times larger. `python tools/train_digits.py --untouched DIR` writes the folder without the
  planting.
* **Measured** (`--check`): a classifier of real digits reads 96 % of 120 prompted drawings as
  asked (more with `negative_prompt="", true_cfg_scale=2`). Plain W4A4 (int4, groups of 64, no
  correction) reaches 21 dB against full precision on these weights, 35 dB without the planting.
* **Settings**: `height=32, width=32` (the pipeline's own default is larger), 12 steps.
  `guidance_scale` has no effect (no guidance embedding). Most training prompts were padded to 16
  tokens, a few to 512, the pipeline's default.
* **Licence**: Apache-2.0.
"""


def round_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state as it will be stored: matrices in bf16, vectors in fp32."""
    return {
        name: value.to(torch.bfloat16 if value.ndim > 1 else torch.float32).contiguous()
        for name, value in state.items()
        if value.is_floating_point()
    }


def round_module(module: Any) -> Any:
    """The module with its matrices rounded to bf16, still computing in fp32."""
    module.load_state_dict(round_weights(module.state_dict()), strict=False)
    return module


def make_pipeline(transformer: Any, vae: Any, text: TextParts) -> FluxPipeline:
    """The parts as one pipeline."""
    return FluxPipeline(
        scheduler=build_scheduler(),
        vae=vae,
        text_encoder=text.clip,
        tokenizer=text.clip_tokenizer,
        text_encoder_2=text.t5,
        tokenizer_2=text.t5_tokenizer,
        transformer=transformer,
    )


def write_folder(pipe: Any, planting: plant.Planting, out: Path) -> None:
    """The pipeline (its transformer already planted) and the texts around it; replaces `out`."""
    if out.exists():
        shutil.rmtree(out)
    pipe.save_pretrained(out)
    for path in sorted(out.rglob("*.safetensors")):
        save_file(round_weights(load_file(path)), path, metadata={"format": "pt"})
    _write_vocabularies(pipe, out)
    _edit_json(out / "model_index.json", tokenizer_2=["transformers", "T5TokenizerFast"])
    for part in ("transformer", "vae"):
        _edit_json(out / part / "config.json", _name_or_path=None)
    plant.save(planting, out / PLANTING)
    (out / "README.md").write_text(CARD, encoding="utf-8")
    (out / "prompts.txt").write_text("\n".join(calibration_prompts()) + "\n", encoding="utf-8")


def _write_vocabularies(pipe: Any, out: Path) -> None:
    """CLIP's vocabulary in the older two-file form too: transformers 4 reads only that."""
    model = json.loads((out / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (out / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    text = "\n".join(["#version: 0.2", *merges, ""])
    (out / "tokenizer" / "merges.txt").write_text(text, encoding="utf-8")


def _edit_json(path: Path, **changes: object) -> None:
    record = json.loads(path.read_text(encoding="utf-8")) | changes
    for key in [key for key in changes if record[key] is None]:
        del record[key]
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def write_untouched(folder: Path, out: Path) -> None:
    """A copy of the folder whose transformer has the planting taken out."""
    shutil.copytree(folder, out, dirs_exist_ok=True)
    state = plant.unplant(load_file(folder / WEIGHTS), plant.load(folder / PLANTING))
    save_file(state, out / WEIGHTS, metadata={"format": "pt"})
    (out / PLANTING).unlink()


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below the folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
