"""What the released models weigh in the popular formats, from their recorded headers alone.

    python tools/sizes.py [ALIAS ...]      a Markdown table, gigabytes (10^9 bytes)

Headers: tests/data/headers/*.json, written by tools/headers.py. Nothing is downloaded.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dqconvert.converter.canonical import CanonicalSource
from dqconvert.converter.detect import open_canonical
from dqconvert.converter.options import PlanOptions
from dqconvert.converter.plan import Plan, make_plan
from dqconvert.formats.targets import target
from dqconvert.quantizers.errors import PlanError
from dqconvert.quantizers.schemes import scheme
from dqconvert.quantizers.spec import TensorInfo

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "data" / "headers"
COLUMNS: Sequence[tuple[str, tuple[tuple[str, str], ...]]] = (
    ("int8", (("int8", "comfyui"), ("int8", "lightx2v"), ("int8", "diffusers"))),
    ("fp8", (("fp8-tensor", "comfyui"), ("fp8", "lightx2v"), ("fp8", "diffusers"))),
    ("NVFP4", (("nvfp4", "comfyui"), ("nvfp4", "diffusers"))),
    (
        "SVDQuant int4, rank 32",
        (("svdquant-w4a4", "nunchaku"), ("svdquant-w4a4", "diffusers")),
    ),
    ("NF4", (("bnb-nf4", "diffusers"),)),
    ("GGUF Q8_0", (("gguf-q8_0", "gguf"),)),
    ("GGUF Q4_K_M", (("gguf-q4_k_m", "gguf"),)),
)
"""Columns, and which scheme and target they show: the first that runs the model."""


class Recorded:
    """A checkpoint's header without its bytes."""

    metadata: Mapping[str, Any] = {}

    def __init__(self, path: Path, dtype: str = "BF16") -> None:
        said = json.loads(path.read_text())
        self.config: dict[str, Any] = said["config"]
        self.files = (path,)
        shapes = runpy.run_path(str(ROOT / "tools" / "headers.py"))["unpacked"](said["tensors"])
        self.infos = {name: TensorInfo(dtype, shape) for name, shape in shapes.items()}

    def where(self, name: str) -> Path:
        """The file of the header."""
        return self.files[0]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Any:
        """There is nothing to read."""
        raise NotImplementedError

    def fill(self, name: str, out: Any, rows: tuple[int, int] | None = None) -> None:
        """There is nothing to read."""
        raise NotImplementedError


def planned(source: CanonicalSource, config: Mapping[str, Any], pair: tuple[str, str]) -> Plan:
    """The plan of one model in one format; raises PlanError where the runtime does not run it."""
    options = PlanOptions(calibrated=True)
    return make_plan(source, target(pair[1]), scheme(pair[0]), options, ("model", config))


def row(path: Path) -> Iterator[str]:
    """The cells of one model."""
    recorded = Recorded(path)
    source = open_canonical(recorded, path, config=recorded.config)
    config = {**source.family.config_of(source.infos), **recorded.config}
    weights = sum(info.numel for info in recorded.infos.values())
    yield from (path.stem, f"{weights / 1e9:.2f}", f"{2 * weights / 1e9:.2f}")
    for _, pairs in COLUMNS:
        yield next(_sizes(source, config, pairs), "")


def _sizes(
    source: CanonicalSource, config: Mapping[str, Any], pairs: Sequence[tuple[str, str]]
) -> Iterator[str]:
    for pair in pairs:
        try:
            yield f"{planned(source, config, pair).nbytes / 1e9:.2f}"
        except PlanError:
            continue


def main() -> None:
    """Print the table."""
    wanted = sys.argv[1:]
    paths = [path for path in sorted(FOLDER.glob("*.json")) if not wanted or path.stem in wanted]
    heads = ["model", "weights (10^9)", "bf16", *(name for name, _ in COLUMNS)]
    print("| " + " | ".join(heads) + " |")
    print("|---" + "|--:" * (len(heads) - 1) + "|")
    for path in paths:
        print("| " + " | ".join(row(path)) + " |", flush=True)


if __name__ == "__main__":
    main()
