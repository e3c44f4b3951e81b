"""Record the headers of released models, from their configs, as tests/data/headers/ALIAS.json.

Tensors of equal shape in consecutive blocks are one row: "blocks.{0..39}.attn.to_q.weight". The
models are made on the meta device, by diffusers or transformers, from the REAL configs of
tests/models/*.py.

    python tools/headers.py [FAMILY ...]
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1] / "tests"
FOLDER = TESTS / "data" / "headers"
_BLOCK = re.compile(r"(?<=\.transformer_blocks\.)\d+(?=\.)")
"""The block of a U-Net, whose transformers are numbered as well."""

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
Shapes = Mapping[str, tuple[int, ...]]


def packed(shapes: Shapes) -> dict[str, list[int]]:
    """Names and shapes with one row for consecutive blocks."""
    found: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    plain: dict[str, list[int]] = {}
    for name, shape in shapes.items():
        number = _BLOCK.search(name) or re.search(r"(?<=\.)\d+(?=\.)", name)
        if number is None:
            plain[name] = list(shape)
            continue
        pattern = f"{name[: number.start()]}{{}}{name[number.end() :]}"
        found.setdefault((pattern, shape), []).append(int(number[0]))
    for (pattern, shape), numbers in found.items():
        for first, last in _runs(sorted(numbers)):
            word = f"{{{first}..{last}}}" if last > first else str(first)
            plain[pattern.replace("{}", word)] = list(shape)
    return plain


def unpacked(rows: Mapping[str, list[int]]) -> dict[str, tuple[int, ...]]:
    """The names and shapes again."""
    found: dict[str, tuple[int, ...]] = {}
    for row, shape in rows.items():
        span = _RANGE.search(row)
        numbers = range(int(span[1]), int(span[2]) + 1) if span else [0]
        for number in numbers:
            found[_RANGE.sub(str(number), row)] = tuple(shape)
    return found


def _runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    first = last = -2
    for number in numbers:
        if number != last + 1:
            if first >= 0:
                yield first, last
            first = number
        last = number
    yield first, last


def record(config: Mapping[str, Any], shapes: Shapes, path: Path) -> None:
    """Write one model's header: one line a row."""
    lines = [f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in packed(shapes).items()]
    said = json.dumps(dict(config), sort_keys=True)
    body = ",\n".join(lines)
    path.write_text(f'{{\n  "config": {said},\n  "tensors": {{\n{body}\n  }}\n}}\n')


def main() -> None:
    """Record all families, or those named."""
    checkpoints = runpy.run_path(str(TESTS / "checkpoints.py"))
    FOLDER.mkdir(exist_ok=True)
    for family, known in checkpoints["FAMILY_MODELS"].items():
        if sys.argv[1:] and family not in sys.argv[1:]:
            continue
        for alias, config in known["REAL"].items():
            tensors = checkpoints["meta_model"](config)
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            record(config, shapes, FOLDER / f"{alias}.json")
            print(alias, len(shapes), flush=True)


if __name__ == "__main__":
    main()
