"""llama.cpp's importance matrices: the mean square of each input channel of a linear, by tensor.

Two containers; which one a file is, its first bytes say.

    .dat     i32 entries; each: i32 length, name, i32 calls, i32 K, f32[K] mean square times calls;
             then i32 calls of the whole, i32 length and the text's name (both optional)
    .gguf    general.type "imatrix", imatrix.datasets (strings), imatrix.chunk_count and
             imatrix.chunk_size (u32); for each linear NAME.in_sum2 F32 [1, K], sums of squares,
             and NAME.counts F32 [1, 1], rows that were summed

llama-quantize reads both and divides by the calls or the count (common/imatrix-loader.cpp,
tools/quantize/quantize.cpp); of the GGUF it wants all three imatrix keys, and gguf.cpp limits NAME
to 55 bytes. stable-diffusion.cpp reads .dat only and never divides: its quantizer gets the stored
numbers (runtime/imatrix.cpp, get_values), takes ones where they are too few, and finds them by
the names that it gives tensors, model.diffusion_model.NAME. Calls weigh a file where several are
merged. The quantizers know no scale of importances but for rounding, so files of ours say 1 call
unless told otherwise, and then all readers see the same bits.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dqconvert.formats.gguf_header import MAGIC, Cursor
from dqconvert.formats.gguf_source import GGUFSource
from dqconvert.formats.writer import StreamWriter
from dqconvert.quantizers.errors import OutputError, SourceError
from dqconvert.quantizers.spec import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

SUMS, COUNTS = ".in_sum2", ".counts"
_SHORTEST = 17
"""Bytes of an entry of one channel with a name of one letter."""


def read(path: Path) -> dict[str, Tensor]:
    """The mean square of each input channel, [K] fp32, by tensor name.

    Raises SourceError where a file is none, is cut off, contradicts itself, or where a mean is
    not a number, negative, or of no row.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}") from error
    found = _read_gguf(path) if start == MAGIC else _read_dat(path)
    if not found:
        raise SourceError(f"{path}: holds no importance matrix")
    return found


def _read_dat(path: Path) -> dict[str, Tensor]:
    import torch

    found: dict[str, Tensor] = {}
    size = path.stat().st_size
    with path.open("rb") as file:
        cursor = Cursor(path, file, size)
        (entries,) = cursor.numbers("i") if size >= 4 else (0,)
        if not 0 < entries <= size // _SHORTEST:
            raise SourceError(f"{path}: not an importance matrix, or cut off ({size} bytes)")
        for _ in range(entries):
            name = cursor.text("i")
            calls, channels = cursor.numbers("ii")
            if channels < 1 or name in found:
                raise SourceError(f"{path}: {name}: twice there, or without channels")
            values = bytearray(cursor.take(4 * channels))
            found[name] = _mean(path, name, torch.frombuffer(values, dtype=torch.float32), calls)
    return found


def _read_gguf(path: Path) -> dict[str, Tensor]:
    source = GGUFSource((path,))
    found: dict[str, Tensor] = {}
    for key, info in source.infos.items():
        name = key.removesuffix(COUNTS)
        if name != key and name + SUMS not in source.infos:
            raise SourceError(f"{path}: {name}: has a count, but no sums")
        if not key.endswith(SUMS):
            continue
        name = key.removesuffix(SUMS)
        count = source.infos.get(name + COUNTS)
        if count is None or {info.dtype, count.dtype} != {"F32"}:
            raise SourceError(f"{path}: {name}: sums without a count, or not in F32")
        if count.numel != 1 or info.numel != info.shape[-1]:
            raise SourceError(f"{path}: {name}: has several experts, which cannot be read")
        rows = float(source.read(name + COUNTS).flatten()[0])
        found[name] = _mean(path, name, source.read(key).flatten(), rows)
    return found


def _mean(path: Path, name: str, sums: Tensor, count: float) -> Tensor:
    """The mean in single precision, as llama-quantize divides."""
    if not 1 <= count < float("inf"):
        raise SourceError(f"{path}: {name}: counts {count} rows")
    mean = sums / round(count)
    if not (mean.isfinite() & (mean >= 0)).all():
        raise SourceError(f"{path}: {name}: holds NaN, infinity or negative mean squares")
    return mean


def write(
    path: Path,
    values: Mapping[str, Tensor],
    count: Mapping[str, int] | int = 1,
    datasets: Sequence[str] = (),
) -> None:
    """Write mean squares [K] by tensor name; GGUF where the path ends in .gguf, else .dat.

    count: rows, or calls, behind each. datasets: what they were measured on. Raises OutputError,
    and ValueError for what read would refuse.
    """
    counts = {name: count if isinstance(count, int) else count[name] for name in values}
    sums = {name: _sums(name, values[name], counts[name]) for name in sorted(values)}
    if not sums:
        raise ValueError("no importances")
    if path.suffix == ".gguf":
        _write_gguf(path, sums, counts, datasets)
        return
    parts = [struct.pack("<i", len(sums))]
    for name, tensor in sums.items():
        text = name.encode()
        parts.append(struct.pack("<i", len(text)) + text)
        parts.append(struct.pack("<ii", counts[name], tensor.numel()))
        parts.append(tensor.numpy().tobytes())
    text = ", ".join(datasets).encode()
    parts.append(struct.pack("<ii", max(counts.values()), len(text)) + text)
    try:
        path.write_bytes(b"".join(parts))
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}") from error


def _sums(name: str, mean: Tensor, count: int) -> Tensor:
    """fp32 [K]: the mean squares times the count."""
    sums = mean.detach().cpu().float() * count
    if not (sums.isfinite() & (sums >= 0)).all() or sums.dim() != 1 or not sums.numel():
        raise ValueError(f"{name}: {list(mean.shape)} are no mean squares of channels")
    if not 0 < count < 1 << 31:
        raise ValueError(f"{name}: counts {count} rows")
    return sums.contiguous()


def _write_gguf(
    path: Path, sums: Mapping[str, Tensor], counts: Mapping[str, int], datasets: Sequence[str]
) -> None:
    import torch

    tensors: dict[str, Tensor] = {}
    for name, tensor in sums.items():
        tensors[name + SUMS] = tensor.view(1, -1)
        tensors[name + COUNTS] = torch.tensor([[float(counts[name])]])
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": list(datasets),
        "imatrix.chunk_count": max(counts.values()),
        "imatrix.chunk_size": 1,
    }
    infos = {name: TensorInfo("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
    with StreamWriter(path, infos, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
