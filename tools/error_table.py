"""The error of ggml's block types on Gaussian weights, beside the least that their bits allow.

Relative RMSE; plain: as without an importance matrix, weighted: with ones. The bound is Shannon's
for a Gaussian source: 2^-bits.
"""

from __future__ import annotations

import click
import torch

from dqconvert.quantizers.ggml import blocks
from dqconvert.quantizers.ggml.blocks import MODULES
from dqconvert.quantizers.spec import BLOCKS, NEEDS_IMPORTANCE

ROWS, COLUMNS = 128, 3072


def error(weight: torch.Tensor, code: str, importance: torch.Tensor | None) -> float:
    """||W' - W|| / ||W||."""
    again = blocks.dequantize(blocks.quantize(weight, code, importance), code)
    return float((again - weight).norm() / weight.norm())


def bits(code: str) -> float:
    """Of a weight, scales and all."""
    weights, size = BLOCKS[code.upper()]
    return 8 * size / weights


@click.command()
def main() -> None:
    """Print the table."""
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(COLUMNS)
    click.echo("| type | bits | bound | plain | weighted |")
    click.echo("|---|---|---|---|---|")
    codes = [code for known in MODULES.values() for code in known]
    for code in sorted(codes, key=lambda code: -bits(code)):
        plain = "" if code in NEEDS_IMPORTANCE else f"{error(weight, code, None):.4f}"
        weighted = f"{error(weight, code, ones):.4f}"
        size = bits(code)
        click.echo(f"| {code.upper()} | {size:.4g} | {2**-size:.4f} | {plain} | {weighted} |")


if __name__ == "__main__":
    main()
