"""A Unigram tokenizer as GGUF metadata: what ComfyUI-GGUF makes UMT5's tokenizer from. Torch-free.

Keys are llama.cpp's, tokenizer.ggml.*; every row of the token embedding has a token, a score and a
type, which are sentencepiece's own. What is left out: precompiled_charsmap, an array of bytes that
only llama.cpp reads (it normalizes Unicode; ComfyUI-GGUF's tokenizer goes without).

Sources: ComfyUI-GGUF loader.py (gguf_tokenizer_loader), llama.cpp conversion/t5.py, sentencepiece
sentencepiece_model.proto, huggingface/tokenizers models/unigram.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from dqconvert.converter.family import single
from dqconvert.converter.resolve import read_json
from dqconvert.quantizers.errors import DQConvertError, SourceError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""SentencePiece.Type."""

FAST, SLOW = "tokenizer.json", "spiece.model"
_UNSCORED, _PADDING = -1000.0, -10000.0
"""Scores of tokens that were added to a model, and of rows of the embedding without a token."""

MAX_TOKENS, MAX_SCORE = 1 << 22, 1e30
"""Beyond any tokenizer's, and within what a GGUF file holds."""

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True, slots=True)
class Unigram:
    """A tokenizer: pieces with score and type, by id; ids are None where there is no such token."""

    pieces: Sequence[tuple[str, float, int]]
    space_prefix: bool
    one_space: bool
    eos: int | None
    pad: int | None
    unknown: int | None


def places_beside(weights: Path) -> tuple[Path, ...]:
    """Where the tokenizer of a text encoder's file or folder may be.

    text_encoder_2 has tokenizer_2 in a pipeline; Wan's first releases have google/umt5-xxl.
    """
    folder = weights if weights.is_dir() else weights.parent
    return (
        folder,
        folder.parent / folder.name.replace("text_encoder", "tokenizer"),
        folder / "tokenizer",
        folder / "google" / "umt5-xxl",
    )


def folder_beside(weights: Path) -> Path | None:
    """The folder of those that has a Unigram tokenizer, or None."""
    places = places_beside(weights)
    return next((p for p in places if (p / FAST).exists() or (p / SLOW).exists()), None)


def metadata(folder: Path, rows: int) -> dict[str, Any]:
    """The keys for a tokenizer's folder; rows: of the model's token embedding.

    SourceError if there is no Unigram tokenizer, or one with more tokens than rows.
    """
    if (folder / FAST).exists():
        return keys(read_fast(folder / FAST), rows, folder)
    if (folder / SLOW).exists():
        return keys(read_slow((folder / SLOW).read_bytes(), folder / SLOW), rows, folder)
    raise SourceError(f"{folder}: no tokenizer; needed is a {FAST} or a {SLOW}")


def keys(found: Unigram, rows: int, where: Path) -> dict[str, Any]:
    """A tokenizer as metadata: strings, numbers, booleans, and three lists with an item a row."""
    pieces = list(found.pieces)
    if len(pieces) > rows:
        raise SourceError(
            f"{where}: {len(pieces)} tokens, but the model's embedding has {rows} rows; "
            "it is another model's tokenizer"
        )
    pieces += [(f"[PAD{i}]", _PADDING, UNUSED) for i in range(len(pieces), rows)]
    tokens, scores, types = zip(*pieces, strict=True)
    said = {
        "model": "t5",
        "pre": "default",
        "tokens": list(tokens),
        "scores": [single(score) for score in scores],
        "token_type": list(types),
        "add_space_prefix": found.space_prefix,
        "remove_extra_whitespaces": found.one_space,
        "eos_token_id": found.eos,
        "padding_token_id": found.pad,
        "unknown_token_id": found.unknown,
        "add_bos_token": False,
        "add_eos_token": True,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in said.items() if value is not None}


def read_slow(model: bytes, where: Path) -> Unigram:
    """sentencepiece's own file; ComfyUI's checkpoints hold the same bytes as spiece_model."""
    try:
        proto: Any = import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()
        broken: Any = import_module("google.protobuf.message").DecodeError
    except ImportError as error:
        raise DQConvertError(
            f"{where}: needs sentencepiece and protobuf: pip install 'dqconvert[calibration]'"
        ) from error
    try:
        proto.ParseFromString(model)
    except broken as error:
        raise SourceError(f"{where}: not a sentencepiece model ({error})") from error
    if not proto.pieces or proto.trainer_spec.model_type != 1:
        raise SourceError(f"{where}: not a Unigram model")
    pieces = [(one.piece, one.score, one.type) for one in proto.pieces]
    ids = (proto.trainer_spec.eos_id, proto.trainer_spec.pad_id, proto.trainer_spec.unk_id)
    eos, pad, unknown = (i if 0 <= i < len(pieces) else None for i in ids)
    spec = proto.normalizer_spec
    return Unigram(pieces, spec.add_dummy_prefix, spec.remove_extra_whitespaces, eos, pad, unknown)


def read_fast(path: Path) -> Unigram:
    """huggingface's file, with the names of special tokens from tokenizer_config.json."""
    said = read_json(path)
    model = said.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), list):
        raise SourceError(f"{path}: not a Unigram model, which is what T5 and UMT5 have")
    vocabulary, added = _vocabulary(path, said)
    unknown, names = model.get("unk_id"), _special(path.parent)
    bytes_too = sum(bool(_BYTE.fullmatch(piece)) for piece, _ in vocabulary) == 256
    pieces = []
    for number in range(max([len(vocabulary), *(i + 1 for i in added)])):
        piece, score = vocabulary[number] if number < len(vocabulary) else ("", _UNSCORED)
        piece = added.get(number, piece) or f"[PAD{number}]"
        kind = NORMAL
        if number == unknown:
            kind = UNKNOWN
        elif piece in names.values():
            kind = CONTROL
        elif bytes_too and _BYTE.fullmatch(piece):
            kind = BYTE
        elif number in added:
            kind = USER_DEFINED
        elif number >= len(vocabulary):
            kind = UNUSED
        pieces.append((piece, score, kind))
    ids = {piece: number for number, (piece, _, _) in enumerate(pieces)}
    eos, pad = ids.get(names["eos_token"]), ids.get(names["pad_token"])
    if not isinstance(unknown, int) or not 0 <= unknown < len(pieces):
        unknown = None
    return Unigram(pieces, _space_prefix(said), _one_space(said), eos, pad, unknown)


def _vocabulary(
    path: Path, said: Mapping[str, Any]
) -> tuple[list[tuple[str, float]], dict[int, str]]:
    """Pieces with their scores, and the tokens that were added, by id; SourceError if broken."""
    try:
        vocabulary = [(str(piece), float(score)) for piece, score in said["model"]["vocab"]]
        added = {int(one["id"]): str(one["content"]) for one in said.get("added_tokens") or []}
        "".join((*(piece for piece, _ in vocabulary), *added.values())).encode()
    except (TypeError, ValueError, KeyError) as error:
        raise SourceError(f"{path}: broken vocabulary ({error!r})") from error
    for number in added:
        if not 0 <= number < MAX_TOKENS:
            raise SourceError(f"{path}: broken vocabulary (a token is number {number})")
    for piece, score in vocabulary:
        if not abs(score) <= MAX_SCORE:
            raise SourceError(f"{path}: broken vocabulary (the score of {piece!r} is {score})")
    return vocabulary, added


def _special(folder: Path) -> dict[str, str]:
    """The end and the padding as a tokenizer's config calls them; T5's own words without one."""
    path = folder / "tokenizer_config.json"
    said = read_json(path) if path.exists() else {}
    found = {}
    for key, usual in (("eos_token", "</s>"), ("pad_token", "<pad>")):
        token = said.get(key) or usual
        found[key] = str(token.get("content", usual) if isinstance(token, dict) else token)
    return found


def _space_prefix(said: Mapping[str, Any]) -> bool:
    """Whether text gets a space before it."""
    for step in _steps(said.get("pre_tokenizer")):
        if step.get("type") == "Metaspace":
            scheme = step.get("prepend_scheme", "always")
            return bool(step.get("add_prefix_space", True)) and scheme != "never"
    return False


def _one_space(said: Mapping[str, Any]) -> bool:
    """Whether spaces are joined: a pattern for two or more, or words that are split at spaces."""
    steps = [*_steps(said.get("normalizer")), *_steps(said.get("pre_tokenizer"))]
    regular = [step["pattern"].get("Regex", "") for step in steps if _has_pattern(step)]
    return any(step.get("type") == "WhitespaceSplit" for step in steps) or " {2,}" in regular


def _has_pattern(step: Mapping[str, Any]) -> bool:
    return isinstance(step.get("pattern"), dict)


def _steps(part: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer or a pre-tokenizer, out of sequences."""
    if isinstance(part, dict):
        yield part
        inside = part.get("normalizers") or part.get("pretokenizers")
        for inner in inside if isinstance(inside, list) else ():
            yield from _steps(inner)
