"""Statistics on disk: one safetensors file, so that a calibration is paid for once.

    metadata    format = "dqconvert calibration", version, key, counts = {site: rows seen} as JSON
    tensors     <site>/absmax, /mean, /mean_square, /rows, and /second_moment where it was kept

Contract: a file is written aside and renamed, so it is whole or absent. It is read only under the
key it was written with. Whatever is wrong with it is a CalibrationError that says what to do.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dqconvert.quantizers.errors import CalibrationError, OutputError
from dqconvert.quantizers.tensors import LayerStats

FORMAT = "dqconvert calibration"
VERSION = "1"
FIELDS = ("absmax", "mean", "mean_square", "rows")
MOMENT = "second_moment"


def save(path: Path, key: str, stats: Mapping[str, LayerStats]) -> None:
    """Write all statistics under a key."""
    tensors: dict[str, Tensor] = {}
    for site, layer in stats.items():
        tensors |= {f"{site}/{field}": getattr(layer, field).contiguous() for field in FIELDS}
        if layer.second_moment is not None:
            tensors[f"{site}/{MOMENT}"] = layer.second_moment.contiguous()
    counts = json.dumps({site: layer.count for site, layer in stats.items()})
    metadata = {"format": FORMAT, "version": VERSION, "key": key, "counts": counts}
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, aside, metadata)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path}: statistics cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            aside.unlink()


def load(path: Path, key: str) -> dict[str, LayerStats]:
    """All statistics of a file."""
    return dict(LazyStats(path, key))


class LazyStats(Mapping[str, LayerStats]):
    """The statistics of a file, of which one site at a time is read."""

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self._counts = _counts(path, _metadata(path), key)

    def __getitem__(self, site: str) -> LayerStats:
        count = self._counts[site]
        try:
            with safe_open(self.path, "pt") as file:
                found = {field: file.get_tensor(f"{site}/{field}") for field in FIELDS}
                moment = f"{site}/{MOMENT}"
                known = moment in file.keys()  # noqa: SIM118 - no container
                second = file.get_tensor(moment) if known else None
        except (OSError, SafetensorError) as error:
            raise CalibrationError(_broken(self.path, str(error))) from error
        return LayerStats(count=count, second_moment=second, **found)

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except FileNotFoundError:
        raise CalibrationError(f"{path}: there is no such file of statistics") from None
    except (OSError, SafetensorError) as error:
        raise CalibrationError(_broken(path, str(error))) from error


def _counts(path: Path, metadata: Mapping[str, str], key: str) -> dict[str, int]:
    """Rows of each site, once the file is known to be the one that is asked for."""
    if metadata.get("format") != FORMAT:
        raise CalibrationError(f"{path}: this is no file of calibration statistics")
    if metadata.get("version") != VERSION:
        raise CalibrationError(
            f"{path}: these statistics have version {metadata.get('version')}, and this program"
            f" reads version {VERSION}; calibrate again"
        )
    if metadata.get("key") != key:
        raise CalibrationError(
            f"{path}: these statistics are of another model, or of other prompts or settings;"
            " calibrate again, or give what they were made with"
        )
    try:
        counts: dict[str, int] = json.loads(metadata["counts"])
    except (KeyError, ValueError):
        raise CalibrationError(_broken(path, "its list of sites cannot be read")) from None
    return counts


def _broken(path: Path, why: str) -> str:
    return f"{path}: truncated, or no file of statistics ({why}); delete it and calibrate again"
