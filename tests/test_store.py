"""The file of statistics: whole or absent, and only read under its own key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dqconvert.calibration.observe import Observer
from dqconvert.calibration.store import LazyStats, load, save
from dqconvert.quantizers.errors import CalibrationError, OutputError
from dqconvert.quantizers.tensors import LayerStats

FIELDS = ("absmax", "mean", "mean_square", "second_moment", "rows")


@pytest.fixture(scope="module")
def stats() -> dict[str, LayerStats]:
    found = {}
    for site, rows in (("blocks.1", 40), ("blocks.0", 9), ("one", 1)):
        observer = Observer(site, 4, True)
        observer.add(torch.randn(rows, 8))
        found[site] = observer.finish()
    return found


@pytest.fixture
def path(tmp_path: Path, stats: dict[str, LayerStats]) -> Iterator[Path]:
    where = tmp_path / "cache" / "stats.safetensors"
    save(where, "k", stats)
    yield where
    assert [file.name for file in where.parent.iterdir()] == [where.name], "nothing else is left"


def test_statistics_survive_the_disk(path: Path, stats: dict[str, LayerStats]) -> None:
    lazy = LazyStats(path, "k")
    assert list(lazy) == list(stats) and len(lazy) == 3
    for found in (load(path, "k"), lazy):
        for site, layer in stats.items():
            assert found[site].count == layer.count
            for field in FIELDS:
                assert torch.equal(getattr(found[site], field), getattr(layer, field))
    with pytest.raises(KeyError):
        lazy["none"]


def test_statistics_without_moments_and_over_an_old_file(
    path: Path, stats: dict[str, LayerStats]
) -> None:
    one, two, three = torch.ones(3, 3).unbind(1)
    rows = torch.ones(3, 2).T
    layer = LayerStats(4, one.clone(), two.clone(), three.clone(), None, rows)
    save(path, "new", {"a": layer})
    assert load(path, "new")["a"].second_moment is None


def test_other_keys_and_other_files_are_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="of another model"):
        load(path, "other")
    with pytest.raises(CalibrationError, match="no such file"):
        load(tmp_path / "none", "k")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.ones(1)}, foreign)
    with pytest.raises(CalibrationError, match="no file of calibration statistics"):
        load(foreign, "k")
    save_file({}, foreign, {"format": "dqconvert calibration", "version": "0", "key": "k"})
    with pytest.raises(CalibrationError, match=r"version 0.*calibrate again"):
        load(foreign, "k")
    save_file({}, foreign, {"format": "dqconvert calibration", "version": "1", "key": "k"})
    with pytest.raises(CalibrationError, match="list of sites"):
        load(foreign, "k")
    foreign.write_text("no file of tensors")
    with pytest.raises(CalibrationError, match="delete it and calibrate again"):
        load(foreign, "k")


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files_are_refused(path: Path, part: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(CalibrationError, match=r"truncated.*calibrate again"):
        load(path, "k")


def test_a_place_that_cannot_be_written(tmp_path: Path, stats: dict[str, LayerStats]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        save(tmp_path / "file" / "stats.safetensors", "k", stats)
