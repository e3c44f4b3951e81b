"""What the demo model understands: a small grammar of prompts that name one digit each.

Contract: pure and deterministic. The same seed gives the same prompts, and every prompt names
exactly one digit, as a word or as a numeral. The empty prompt (label `NOTHING`) means "any digit".
"""

from __future__ import annotations

import random
from collections.abc import Iterator

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NOTHING = 10  # the label of the empty prompt

OPENERS = (
    "",
    "a photo of ",
    "a picture of ",
    "an image of ",
    "a drawing of ",
    "please draw ",
    "write ",
)
KINDS = ("", "a ", "the ", "the digit ", "the number ", "the numeral ", "number ", "digit ")
MANNERS = (
    "",
    "a handwritten ",
    "a handwritten digit ",
    "a neat ",
    "a bold ",
    "a small ",
    "a scribbled ",
)
ENDINGS = (
    "",
    ", handwritten",
    " in white ink",
    " on a black background",
    ", white on black",
    " written by hand",
    " in chalk on a blackboard",
)
CALIBRATION = (
    "a handwritten {}",
    "the digit {}",
    "number {}, handwritten",
    "a photo of a {}",
    "a picture of the number {}",
    "please draw a {} in white ink",
    "the numeral {} on a black background",
    "an image of a handwritten digit {}",
)
JUDGING = (*CALIBRATION, "{}", "write the number {}", "a bold {}, white on black", "a small {}")


def phrases() -> Iterator[str]:
    """Every template of the grammar, with {} where the digit goes."""
    for opener in OPENERS:
        for kind in dict.fromkeys(KINDS + MANNERS):
            for ending in ENDINGS:
                yield f"{opener}{kind}{{}}{ending}"


def corpus() -> list[str]:
    """Every prompt of the grammar in lower case: the tokenizers learn from it."""
    names = [*DIGITS, *"0123456789"]
    return [phrase.format(name) for phrase in phrases() for name in names]


def prompt_pool(per_digit: int, seed: int) -> tuple[list[str], list[int]]:
    """Training prompts and their labels: `per_digit` for each digit, then one empty prompt."""
    rng = random.Random(seed)
    templates = list(phrases())
    prompts: list[str] = []
    labels: list[int] = []
    for digit, word in enumerate(DIGITS):
        for _ in range(per_digit):
            name = word if rng.random() < 0.7 else str(digit)
            prompt = rng.choice(templates if rng.random() < 0.7 else JUDGING).format(name)
            prompts.append(prompt.capitalize() if rng.random() < 0.15 else prompt)
            labels.append(digit)
    return [*prompts, ""], [*labels, NOTHING]


def calibration_prompts() -> list[str]:
    """The 32 prompts shipped as prompts.txt: all ten digits, all calibration templates."""
    return [
        CALIBRATION[(index + index // 8) % len(CALIBRATION)].format(DIGITS[index % 10])
        for index in range(32)
    ]


def judging_prompts() -> tuple[list[str], list[int]]:
    """Twelve word prompts for each digit, and the digit each of them names."""
    pairs = [
        (phrase.format(word), digit) for digit, word in enumerate(DIGITS) for phrase in JUDGING
    ]
    return [prompt for prompt, _ in pairs], [digit for _, digit in pairs]
