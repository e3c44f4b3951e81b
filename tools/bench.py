"""How fast, and in how much memory: conversions of a synthetic FLUX.1 of true widths, beside `cp`.

    python tools/bench.py [--blocks 2x4] [--runs 3] [--schemes int8,fp8@vllm,svdquant-w4a4]

Every command is a process of its own, from start to exit, with the page cache warm. Commands take
turns, and ratios are taken within a turn, so that a machine whose speed drifts is no harm.
"start-up" converts a model of 11 MB: what the interpreter and torch take; "x cp, warm" is without
it. A conversion flushes its output to the disk and hashes it, as `cp and sync` half does.
Calibration is not part of it.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import bench_blocks
import click

from dqconvert.formats.writer import StreamWriter
from dqconvert.quantizers.spec import TensorInfo

SCHEMES = (
    "int8,fp8@vllm,fp8-tensor,fp8-block128@sglang,mxfp8,nvfp4,convrot-int8,convrot-w4a4,"
    "convrot-w4a8,svdquant-w4a4"
)
REQUANTIZED = "int8 from fp8 source"
"""A conversion of an already quantized file, half the size of the others' source."""

MERGED, RANK = "int8 with LoRA", 32

FLUX_DEV = (19, 38)
"""Double and single blocks of FLUX.1-dev."""

WIDTH = 3072


@dataclass(frozen=True, slots=True)
class Run:
    """One process: wall and CPU seconds, and its largest resident memory in bytes."""

    wall: float
    cpu: float
    memory: int


def checkpoint(path: Path, double: int, single: int) -> None:
    """A FLUX.1 of true widths and few blocks, in original names, bf16, a few outlier channels."""
    import torch  # in a process of its own: a child's memory begins with its parent's

    infos = {name: TensorInfo("BF16", shape) for name, shape in _shapes(double, single).items()}
    generator = torch.Generator().manual_seed(0)
    with StreamWriter(path, infos, {}) as writer:
        for name, info in infos.items():
            tensor = torch.randn(info.shape, generator=generator).mul_(0.02)
            if tensor.ndim == 2:
                tensor[:, ::211] *= 8
            writer.write(name, tensor.bfloat16())


def adapter(path: Path, double: int, single: int) -> None:
    """A LoRA of all linears in the blocks, in kohya's names, bf16."""
    import torch

    infos = {}
    for name, shape in _shapes(double, single).items():
        if "_blocks." in name and len(shape) == 2:
            base = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
            infos[f"{base}.lora_down.weight"] = TensorInfo("BF16", (RANK, shape[1]))
            infos[f"{base}.lora_up.weight"] = TensorInfo("BF16", (shape[0], RANK))
    generator = torch.Generator().manual_seed(1)
    with StreamWriter(path, infos, {}) as writer:
        for name, info in infos.items():
            tensor = torch.randn(info.shape, generator=generator).mul_(0.02)
            writer.write(name, tensor.bfloat16())


def _made(make: Callable[[Path, int, int], None], path: Path, double: int, single: int) -> Path:
    """A file, written by a process of its own if it is not there."""
    if not path.exists():
        spawn = multiprocessing.get_context("spawn")
        maker = spawn.Process(target=make, args=(path, double, single))
        maker.start()
        maker.join()
    return path


def _shapes(double: int, single: int) -> dict[str, tuple[int, ...]]:
    linears = {
        "img_in": (WIDTH, 64),
        "txt_in": (WIDTH, 4096),
        "final_layer.linear": (64, WIDTH),
        "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
    }
    for name, width in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        linears[f"{name}.in_layer"] = (WIDTH, width)
        linears[f"{name}.out_layer"] = (WIDTH, WIDTH)
    norms = []
    for i in range(double):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            linears[f"{block}_mod.lin"] = (6 * WIDTH, WIDTH)
            linears[f"{block}_attn.qkv"] = (3 * WIDTH, WIDTH)
            linears[f"{block}_attn.proj"] = (WIDTH, WIDTH)
            linears[f"{block}_mlp.0"] = (4 * WIDTH, WIDTH)
            linears[f"{block}_mlp.2"] = (WIDTH, 4 * WIDTH)
            norms += [f"{block}_attn.norm.{kind}_norm.scale" for kind in ("query", "key")]
    for i in range(single):
        block = f"single_blocks.{i}"
        linears[f"{block}.modulation.lin"] = (3 * WIDTH, WIDTH)
        linears[f"{block}.linear1"] = (7 * WIDTH, WIDTH)
        linears[f"{block}.linear2"] = (WIDTH, 5 * WIDTH)
        norms += [f"{block}.norm.{kind}_norm.scale" for kind in ("query", "key")]
    shapes: dict[str, tuple[int, ...]] = {name: (128,) for name in norms}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def measure(command: Sequence[str]) -> Run:
    """Run a command to its end; CalledProcessError if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=_environment())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Run(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def _environment() -> dict[str, str]:
    """The package from this checkout, installed or not."""
    return os.environ | {"PYTHONPATH": str(Path(__file__).parent / "ns")}


def _report(name: str, found: dict[str, list[Run]], size: int) -> None:
    """One row: seconds, throughput, speed beside cp with and without the start of the process."""
    runs, copies, starts = found[name], found["cp"], found["start-up"]
    wall = statistics.median(run.wall for run in runs)
    cells = f"{name:22}{wall:9.2f}{statistics.median(r.cpu for r in runs):9.2f}"
    if name != "start-up":
        ratio = statistics.median(c.wall / r.wall for c, r in zip(copies, runs, strict=False))
        cells += f"{size / wall / 1e9:9.2f}{ratio:9.2f}"
    if name not in ("start-up", "cp", "cp and sync"):
        warm = statistics.median(
            c.wall / max(r.wall - s.wall, 1e-9)
            for c, r, s in zip(copies, runs, starts, strict=False)
        )
        cells += f"{warm:12.2f}"
    click.echo(f"{cells:72}{max(r.memory for r in runs) / 2**30:6.2f}")


@click.command()
@click.option("--blocks", default="2x4", show_default=True, help="Double x single blocks.")
@click.option("--runs", default=3, show_default=True)
@click.option("--schemes", default=SCHEMES, show_default=True, metavar="SCHEME[@TARGET],...")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("bench"))
@click.option("--ggml", is_flag=True, help="The kernels of ggml's block types instead.")
@click.option("--library", type=click.Path(path_type=Path), help="libggml-base.so to run beside.")
def main(
    blocks: str, runs: int, schemes: str, folder: Path, ggml: bool, library: Path | None
) -> None:
    """Measure conversions of a synthetic FLUX.1 beside `cp` of the same file."""
    if ggml or library:
        bench_blocks.table(library)
        return
    double, single = map(int, blocks.split("x"))
    folder.mkdir(exist_ok=True)
    source = _made(checkpoint, folder / f"flux-{blocks}.safetensors", double, single)
    lora = _made(adapter, folder / f"lora-{blocks}.safetensors", double, single)
    size = source.stat().st_size
    flags = ["-q", "--overwrite"]
    convert = [sys.executable, "-m", "dqconvert.converter.cli", str(source), *flags]
    small = [*convert[:3], "flux-digits", "--scheme", "int8", *flags]
    copy = folder / "copy"
    commands = {
        "cp": ["cp", str(source), str(copy)],
        "cp and sync": ["sh", "-c", f"cp '{source}' '{copy}' && sync '{copy}'"],
        "start-up": [*small, "-o", str(folder / "start-up")],
    }
    for name in schemes.split(","):
        scheme, _, target = name.partition("@")
        words = ["--scheme", scheme, *(["--target", target] if target else [])]
        commands[name] = [*convert, *words, "-o", str(folder / name)]
    eight = folder / "fp8 source"
    measure([*convert, "--scheme", "fp8-tensor", "-o", str(eight)])
    requantize = [*convert[:3], str(eight), *flags, "--scheme", "int8"]
    commands[REQUANTIZED] = [*requantize, "-o", str(folder / "requantized")]
    merge = [*convert, "--scheme", "int8", "--lora", str(lora)]
    commands[MERGED] = [*merge, "-o", str(folder / "merged")]
    measure(commands["cp"])
    found: dict[str, list[Run]] = {name: [] for name in commands}
    for turn in range(runs):
        for name, command in commands.items():
            if turn == 0 or not name.startswith("svdquant"):
                copy.unlink(missing_ok=True)
                os.sync()  # nobody pays for the write-back of the one before
                found[name].append(measure(command))
    copy.unlink(missing_ok=True)
    click.echo(f"{size / 1e9:.2f} GB, {double} double and {single} single blocks\n")
    click.echo("                        wall s    CPU s     GB/s    x cp  x cp, warm  peak GiB")
    for name in found:
        _report(name, found, size)
    for name in found:
        if name.startswith("svdquant"):
            whole = _whole_model(found[name][0].wall, double, single)
            each = found[name][0].wall / _layers(double, single)
            click.echo(
                f"\n{name}, data-free: {each:.2f} s for each 3072x12288 weights; "
                f"FLUX.1-dev (19+38 blocks) would take {whole / 60:.0f} minutes"
            )


def _weights(double: int, single: int) -> float:
    """Weights of the blocks."""
    return sum(
        shape[0] * shape[1]
        for name, shape in _shapes(double, single).items()
        if len(shape) == 2 and "_blocks." in name
    )


def _layers(double: int, single: int) -> float:
    return _weights(double, single) / (4 * WIDTH * WIDTH)


def _whole_model(seconds: float, double: int, single: int) -> float:
    return seconds * _weights(*FLUX_DEV) / _weights(double, single)


if __name__ == "__main__":
    main()
