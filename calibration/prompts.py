"""The user's prompts: a text file, one prompt a line, or JSON lines with more to say.

    prompts.txt      a handwritten seven
    prompts.jsonl    {"prompt": "a handwritten seven", "seed": 3, "negative_prompt": null}

Contract: torch-free. Blank lines are skipped. Every error is a CalibrationError that names the
file, the line and the way out. `tests/test_prompts.py` holds each of them.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dqconvert.quantizers.errors import CalibrationError


@dataclass(frozen=True, slots=True)
class Prompt:
    """One picture to draw while calibrating.

    seed: of the initial noise, None to derive it from the settings and the prompt's place;
    image: path of an input picture, for pipelines that edit one; guidance: its strength, None for
    that of the settings.
    """

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    image: str | None = None
    guidance: float | None = None


KEYS = tuple(field.name for field in fields(Prompt))
KINDS = {"seed": ((int,), "an integer"), "guidance": ((int, float), "a number")}
"""What values are that are no strings."""


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """The prompts of a .txt or .jsonl file."""
    readers: dict[str, Callable[[Path, str, str], Prompt]] = {".txt": _plain, ".jsonl": _json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise CalibrationError(
            f"{path}: prompts are read from .txt (one a line) or .jsonl files; rename the file"
        )
    prompts = tuple(reader(path, place, line) for place, line in _lines(path))
    if not prompts:
        raise CalibrationError(f"{path}: the file holds no prompts; write at least one line")
    return prompts


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(path:line, text) of the lines that are not blank.

    Only newlines end a line: JSON strings may hold U+2028, at which str.splitlines would cut.
    """
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line.strip()


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CalibrationError(
            f"{path}: there is no such file; give a .txt or .jsonl file of prompts"
        ) from None
    except OSError as error:
        raise CalibrationError(f"{path}: the file cannot be read: {error.strerror}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise CalibrationError(
            f"{path}:{line}: this is not UTF-8; save the file as UTF-8"
        ) from None


def _plain(path: Path, place: str, line: str) -> Prompt:
    return Prompt(line)


def _json(path: Path, place: str, line: str) -> Prompt:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise CalibrationError(
            f"{place}: this is not JSON ({error.msg} at column {error.colno}); "
            'write one object a line, such as {"prompt": "a cat"}'
        ) from None
    if not isinstance(entry, dict):
        raise CalibrationError(
            f"{place}: this is JSON but no object; write it as {json.dumps({'prompt': 'a cat'})}"
        )
    _check_keys(place, entry)
    for key, value in entry.items():
        _check_value(place, key, value)
    return Prompt(**{**entry, "image": _image(path, place, entry.get("image"))})


def _check_keys(place: str, entry: dict[str, Any]) -> None:
    for key in entry:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(KEYS)}"
            raise CalibrationError(f"{place}: the key '{key}' is unknown; {hint}")
    if "prompt" not in entry:
        raise CalibrationError(f"{place}: the key 'prompt' is missing; add one, it may be empty")


def _check_value(place: str, key: str, value: Any) -> None:
    wanted, word = KINDS.get(key, ((str,), "a string"))
    optional = key != "prompt"
    if (value is None and optional) or type(value) in wanted:
        return
    word += " or null" if optional else ""
    raise CalibrationError(f"{place}: '{key}' is {json.dumps(value)}; it must be {word}")


def _image(path: Path, place: str, image: str | None) -> str | None:
    """The picture's path, which a file of prompts gives relative to itself."""
    if image is None:
        return None
    found = path.parent / image
    if not found.is_file():
        raise CalibrationError(
            f"{place}: there is no picture {found}; paths start at {path.parent}"
        )
    return str(found)
