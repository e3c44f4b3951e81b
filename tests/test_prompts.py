"""Prompt files: what is read from them, and every way in which they can be wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dqconvert.calibration.prompts import Prompt, read_prompts
from dqconvert.calibration.settings import CalibrationSettings, Site, stats_key
from dqconvert.quantizers.errors import CalibrationError


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_text_has_one_prompt_a_line_and_blank_lines_do_not_count(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "a cat\r\n\n   \n ein Dachs, gemütlich \n")
    assert read_prompts(path) == (Prompt("a cat"), Prompt("ein Dachs, gemütlich"))


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path, "p.txt", b"\xef\xbb\xbfa cat")) == (Prompt("a cat"),)


def test_json_lines_carry_all_fields(tmp_path: Path) -> None:
    picture = write(tmp_path, "cat.png", b"")
    entry = {"prompt": "x", "negative_prompt": "y", "image": "cat.png", "seed": 7, "guidance": 0}
    path = write(tmp_path, "p.jsonl", json.dumps(entry) + '\n\n{"prompt": "", "seed": null}\n')
    assert read_prompts(path) == (Prompt("x", "y", 7, str(picture), 0), Prompt(""))


def test_a_line_separator_inside_a_json_string_is_part_of_it(tmp_path: Path) -> None:
    path = write(tmp_path, "p.jsonl", '{"prompt": "a\u2028b"}\n')
    assert read_prompts(path) == (Prompt("a\u2028b"),)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", "\n \n", ["p.txt: ", "no prompts"]),
        ("p.jsonl", "", ["p.jsonl: ", "no prompts"]),
        ("p.csv", "a cat", ["p.csv: ", ".txt", ".jsonl"]),
        ("p.txt", b"a cat\na d\xffg\n", ["p.txt:2: ", "UTF-8"]),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt" "b"}', ["p.jsonl:2: ", "not JSON", "column 11"]),
        ("p.jsonl", '"a cat"', ["p.jsonl:1: ", "no object"]),
        ("p.jsonl", '\n{"seed": 1}', ["p.jsonl:2: ", "'prompt' is missing"]),
        ("p.jsonl", '{"promt": "a"}', ["p.jsonl:1: ", "'promt'", "did you mean 'prompt'"]),
        ("p.jsonl", '{"prompt": "a", "zzz": 1}', ["'zzz'", "known keys: prompt, negative_prompt"]),
        ("p.jsonl", '{"prompt": null}', ["'prompt' is null", "a string"]),
        ("p.jsonl", '{"prompt": "a", "seed": "3"}', ["'seed' is \"3\"", "an integer or null"]),
        ("p.jsonl", '{"prompt": "a", "seed": true}', ["'seed' is true", "an integer or null"]),
        ("p.jsonl", '{"prompt": "a", "guidance": "3"}', ["'guidance' is", "a number or null"]),
        ("p.jsonl", '{"prompt": "a", "image": "no.png"}', ["p.jsonl:1: ", "no picture", "no.png"]),
    ],
)
def test_errors_name_the_place_and_the_way_out(
    tmp_path: Path, name: str, content: str | bytes, words: list[str]
) -> None:
    with pytest.raises(CalibrationError) as caught:
        read_prompts(write(tmp_path, name, content))
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"none\.txt: there is no such file"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "dir.txt").mkdir()
    with pytest.raises(CalibrationError, match=r"dir\.txt: the file cannot be read"):
        read_prompts(tmp_path / "dir.txt")


@pytest.mark.parametrize("name", ["steps", "height", "width", "samples", "rows"])
def test_settings_refuse_what_cannot_be_run(name: str) -> None:
    with pytest.raises(CalibrationError, match=f"{name} is 0"):
        CalibrationSettings(**{"steps": 1, name: 0})


def test_settings_refuse_an_unknown_dtype() -> None:
    with pytest.raises(CalibrationError, match="'fp32'; choose float32"):
        CalibrationSettings(1, dtype="fp32")


def test_chosen_prompts_have_seeds_of_their_own() -> None:
    prompts = [Prompt("a"), Prompt("b", seed=40), Prompt("c"), Prompt("d")]
    chosen = CalibrationSettings(1, seed=5, samples=3).chosen(prompts)
    assert [prompt.seed for prompt in chosen] == [5, 40, 7]


PROMPTS = (Prompt("a"), Prompt("b", seed=4))
SITES = (Site("x", "x"), Site("y", "y.0"))
SETTINGS = CalibrationSettings(4)
KEY = stats_key("model", PROMPTS, SETTINGS, SITES)


def test_the_key_is_stable() -> None:
    """A constant: caches of users must not expire by accident. Change RULES to expire them."""
    assert KEY == "77b26f01fcb3c90789de04aa1439ec75104df47e2652728632ddb31f8524d6b6"


@pytest.mark.parametrize(
    ("model", "prompts", "settings", "sites"),
    [
        ("model", PROMPTS, SETTINGS, SITES[::-1]),
        ("model", (*PROMPTS, Prompt("c")), CalibrationSettings(4, samples=2), SITES),
        ("model", (Prompt("a", seed=0), PROMPTS[1]), SETTINGS, SITES),
        ("model", PROMPTS, CalibrationSettings(4, device="cuda"), SITES),
    ],
)
def test_the_key_ignores_what_changes_nothing(model, prompts, settings, sites) -> None:  # type: ignore[no-untyped-def]
    assert stats_key(model, prompts, settings, sites) == KEY


@pytest.mark.parametrize(
    ("model", "prompts", "settings", "sites"),
    [
        ("other", PROMPTS, SETTINGS, SITES),
        ("model", PROMPTS[::-1], SETTINGS, SITES),
        ("model", (Prompt("a", "bad"), PROMPTS[1]), SETTINGS, SITES),
        ("model", PROMPTS, CalibrationSettings(5), SITES),
        ("model", PROMPTS, CalibrationSettings(4, seed=1), SITES),
        ("model", PROMPTS, CalibrationSettings(4, dtype="bfloat16"), SITES),
        ("model", PROMPTS, SETTINGS, SITES[:1]),
    ],
)
def test_the_key_covers_what_changes_the_statistics(model, prompts, settings, sites) -> None:  # type: ignore[no-untyped-def]
    assert stats_key(model, prompts, settings, sites) != KEY


def test_the_key_covers_the_pictures_not_their_paths(tmp_path: Path) -> None:
    def key(name: str, content: bytes) -> str:
        path = write(tmp_path, name, content)
        return stats_key("m", [Prompt("a", image=str(path))], SETTINGS, SITES)

    assert key("a.png", b"1") == key("b.png", b"1") != key("a.png", b"2")


def test_prompts_and_settings_do_not_import_torch() -> None:
    code = (
        "import sys; import dqconvert.calibration.prompts, dqconvert.calibration.settings;"
        "sys.exit('torch' in sys.modules)"
    )
    paths = [str(Path(__file__).parents[1] / "tools" / "ns"), *sys.path]
    code = f"import sys; sys.path[:0] = {paths!r}; " + code
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
