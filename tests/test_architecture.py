"""The law of the house: who may import whom, what is shipped, and what answers without torch."""

from __future__ import annotations

import ast
import graphlib
import importlib
import json
import os
import pkgutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dqconvert.converter import families
from dqconvert.formats import targets
from dqconvert.quantizers import schemes
from dqconvert.quantizers.errors import UnknownName

ROOT = Path(__file__).parents[1]
ROOMS = ("quantizers", "formats", "calibration", "converter")
MAY_IMPORT: Mapping[str, frozenset[str]] = {
    "quantizers": frozenset(),
    "formats": frozenset({"quantizers"}),
    "calibration": frozenset({"quantizers"}),
    "converter": frozenset({"quantizers", "formats", "calibration"}),
}


@cache
def modules() -> dict[str, Path]:
    """All modules of ours by full name."""
    found = {}
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join(("dqconvert", *parts))] = path
    return found


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere: at the top, in functions, for types alone."""
    known = modules()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            for alias in node.names:
                assert alias.name != "*", f"{path}:{node.lineno}: star import"
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in known else node.module


@cache
def graph() -> dict[str, set[str]]:
    """Modules of ours, each with those of ours that it imports."""
    found = {}
    for name, path in modules().items():
        ours = {other for other in imports(path) if other.split(".")[0] == "dqconvert"}
        assert ours <= modules().keys(), f"{name} imports what is not there: {ours}"
        found[name] = ours
    return found


def room(module: str) -> str:
    return module.split(".")[1]


def test_the_rooms_are_the_shipped_ones() -> None:
    assert len(modules()) > 40
    assert {room(name) for name in modules()} == set(ROOMS)


@pytest.mark.parametrize("name", sorted(modules()))
def test_no_arrow_goes_up_or_sideways(name: str) -> None:
    for other in graph()[name]:
        allowed = MAY_IMPORT[room(name)] | {room(name)}
        assert room(other) in allowed, f"{name} imports {other}"


def test_no_cycle() -> None:
    try:
        graphlib.TopologicalSorter(graph()).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_bare_import_of_a_room() -> None:
    """`formats` and `quantizers` are other people's packages on the index."""
    everything = [*modules().values(), *ROOT.glob("tests/*.py"), *ROOT.glob("tools/**/*.py")]
    for path in everything:
        for name in imports(path):
            assert name.split(".")[0] not in ROOMS, f"{path} imports {name}"


# ---------------------------------------------------------------------------- the package


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_with_code_is_shipped() -> None:
    folders = {
        ".".join(("dqconvert", *path.parent.relative_to(ROOT).parts))
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
    }
    setuptools = project()["tool"]["setuptools"]
    assert set(setuptools["packages"]) == folders
    assert len(setuptools["packages"]) == len(folders)
    for name in folders:
        path = ROOT.joinpath(*name.split(".")[1:])
        assert (path / "__init__.py").is_file(), f"{path} is no package"
    assert setuptools["package-dir"] == {f"dqconvert.{room}": room for room in ROOMS}


def test_the_development_view_is_four_links() -> None:
    view = ROOT / "tools" / "ns" / "dqconvert"
    assert {path.name for path in view.iterdir()} == set(ROOMS)
    for link in view.iterdir():
        assert link.is_symlink()
        assert os.readlink(link) == f"../../../{link.name}"
        assert link.resolve() == ROOT / link.name


# --------------------------------------------------------------------------- without torch


def answer(*words: str) -> dict[str, Any]:
    """Run the command line in a fresh interpreter; what it printed, imported and took."""
    program = (
        "import json, os, sys, time\n"
        "from dqconvert.converter.cli import main\n"
        "code = 0\n"
        "try:\n"
        f"    main({list(words)!r}) if {bool(words)} else None\n"
        "except SystemExit as done:\n"
        "    code = done.code or 0\n"
        "heavy = [m for m in ('torch', 'numpy', 'diffusers', 'transformers') if m in sys.modules]\n"
        "print(json.dumps([code, heavy, sum(os.times()[:2])]), file=sys.stderr)\n"
    )
    path = str(ROOT / "tools" / "ns")
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    code, heavy, seconds = json.loads(done.stderr.splitlines()[-1])
    return {"out": done.stdout, "code": code, "heavy": heavy, "seconds": seconds}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), ""),
        (("--help",), "Usage:"),
        (("convert", "--help"), "--scheme"),
        (("list", "schemes"), "svdquant-w4a4"),
        (("list", "targets"), "nunchaku"),
        (("list", "models"), "flux1-dev"),
        (("inspect", "flux-digits"), None),
        (("flux-digits", "--scheme", "svdquant-w4a4", "--dry-run"), "single_transformer_blocks"),
        (("flux-digits", "--scheme", "int8", "--dry-run", "--json"), "{"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_answers_at_once_without_torch(
    words: tuple[str, ...], says: str | None, tmp_path: Path
) -> None:
    """Seconds of the processor, since a busy machine makes everybody wait."""
    if "flux-digits" in words:
        digits = ROOT / "converter" / "data" / "flux-digits"
        words = tuple(str(digits) if w == "flux-digits" else w for w in words)
    if "--dry-run" in words:
        words += ("-o", str(tmp_path / "out"))
    found = answer(*words)
    assert found["code"] == 0
    assert found["heavy"] == []
    assert found["seconds"] < 2
    assert says is None or says in found["out"]
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------ registries

REGISTRIES: tuple[tuple[ModuleType, str, str, Callable[[str], Any]], ...] = (
    (schemes, "schemes", "scheme", schemes.scheme),
    (targets, "targets", "target", targets.target),
    (families, "families", "family", families.family),
)
every_registry = pytest.mark.parametrize(
    ("module", "plural", "kind", "get"), REGISTRIES, ids=[r[1] for r in REGISTRIES]
)


@every_registry
def test_the_folder_is_the_registry(
    module: ModuleType, plural: str, kind: str, get: Callable[[str], Any]
) -> None:
    found = getattr(module, plural)()
    assert list(found) == sorted(found)
    with pytest.raises(TypeError):
        found["new"] = None
    for name, entry in found.items():
        assert get(name) is entry
        assert name == name.lower().strip()
    files = [m.name for m in pkgutil.iter_modules(module.__path__)]
    assert len(files) >= 1
    for name in files:
        importlib.import_module(f"{module.__name__}.{name}")


@every_registry
def test_unknown_names_are_refused_with_near_ones(
    module: ModuleType, plural: str, kind: str, get: Callable[[str], Any]
) -> None:
    for name in getattr(module, plural)():
        with pytest.raises(UnknownName, match=f"no {kind} is called '{name}x'; did you mean ") as e:
            get(f"{name}x")
        assert name in str(e.value)
    with pytest.raises(UnknownName, match=f"no {kind} is called '§'; known: "):
        get("§")


@every_registry
def test_two_of_a_name_are_refused(
    module: ModuleType,
    plural: str,
    kind: str,
    get: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The folder read twice: each module comes again under its own name."""
    once = list(pkgutil.iter_modules(module.__path__))
    monkeypatch.setattr(module.pkgutil, "iter_modules", lambda path: once + once)
    with pytest.raises(ValueError, match=f"two {plural} are called"):
        getattr(module, plural).__wrapped__()
