"""Tokenizers in GGUF: ComfyUI-GGUF's reconstruction cuts text as sentencepiece itself does."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from dqconvert.converter import tokenizers
from dqconvert.quantizers.errors import SourceError

ROWS = 512
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "draws", "digits"]
TEXTS = ["the quick fox", "  two   spaces ", "Ünïcode is not there: 猫", "", "draws drawn foxes"]
KEY = "tokenizer.ggml."


@pytest.fixture(scope="module")
def spiece() -> bytes:
    """A small model with the special tokens where UMT5's are, and bytes for unknown letters."""
    rng, out = random.Random(0), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(rng.choices(WORDS, k=12)) for _ in range(300)]),
        model_writer=out,
        model_type="unigram",
        vocab_size=330,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return out.getvalue()


@pytest.fixture
def slow(spiece: bytes, tmp_path: Path) -> Path:
    """A folder with sentencepiece's file alone."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / tokenizers.SLOW).write_bytes(spiece)
    return tmp_path / "tokenizer"


@pytest.fixture
def fast(spiece: bytes, tmp_path: Path) -> Path:
    """A folder with huggingface's file of the same model, and three tokens more."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(spiece)
    vocabulary = [(piece.piece, piece.score) for piece in proto.pieces]
    made = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Strip(left=False, right=True)])
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    made.add_special_tokens(["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(3))])
    folder = tmp_path / "tokenizer_2"
    folder.mkdir()
    made.save(str(folder / tokenizers.FAST))
    said = {"eos_token": "</s>", "pad_token": {"content": "<pad>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


def comfyui(said: dict[str, Any]) -> bytes:
    """What ComfyUI-GGUF's loader.py makes of the keys."""
    found = sentencepiece_model_pb2.ModelProto()
    assert said[f"{KEY}model"] == "t5"
    found.normalizer_spec.add_dummy_prefix = said[f"{KEY}add_space_prefix"]
    found.normalizer_spec.remove_extra_whitespaces = said[f"{KEY}remove_extra_whitespaces"]
    lists = (said[f"{KEY}{name}"] for name in ("tokens", "scores", "token_type"))
    for token, score, kind in zip(*lists, strict=True):
        piece = found.SentencePiece()
        piece.piece, piece.score, piece.type = token, score, kind
        found.pieces.append(piece)
    found.trainer_spec.byte_fallback = True
    found.trainer_spec.vocab_size = len(said[f"{KEY}tokens"])
    found.trainer_spec.eos_id = said[f"{KEY}eos_token_id"]
    found.trainer_spec.pad_id = said[f"{KEY}padding_token_id"]
    return bytes(found.SerializeToString())


def processor(model: bytes) -> Any:
    found = sentencepiece.SentencePieceProcessor()
    found.LoadFromSerializedProto(model)
    return found


@pytest.mark.parametrize("kind", ["slow", "fast"])
def test_comfyui_cuts_text_as_the_original_does(kind: str, spiece: bytes, request: Any) -> None:
    said = tokenizers.metadata(request.getfixturevalue(kind), ROWS)
    before, after = processor(spiece), processor(comfyui(said))
    for text in TEXTS:
        assert after.EncodeAsIds(text) == before.EncodeAsIds(text), text
    assert (after.eos_id(), after.pad_id(), after.unk_id()) == (1, 0, 2)


def test_both_files_say_the_same(slow: Path, fast: Path) -> None:
    """But for the tokens that were added, which stand behind the model's own."""
    one, two = tokenizers.metadata(slow, ROWS), tokenizers.metadata(fast, ROWS)
    assert one.keys() == two.keys()
    tokens, kinds = one[f"{KEY}tokens"], one[f"{KEY}token_type"]
    own = tokens.index(next(token for token in tokens if token.startswith("[PAD")))
    added = [*(f"<extra_id_{i}>" for i in range(3)), f"[PAD{own + 3}]"]
    assert two[f"{KEY}tokens"][own : own + 4] == added
    assert two[f"{KEY}token_type"][own : own + 4] == [4, 4, 4, 5]
    for key in one:
        if isinstance(one[key], list):
            assert one[key][:own] == two[key][:own], key
            assert len(one[key]) == len(two[key]) == ROWS
        else:
            assert one[key] == two[key], key
    assert kinds[:3] == [3, 3, 2] and kinds[own:] == [5] * (ROWS - own)
    assert kinds.count(gguf.TokenType.BYTE) == 256


def test_the_keys_are_ggufs(slow: Path) -> None:
    words = {value for value in vars(gguf.Keys.Tokenizer).values() if isinstance(value, str)}
    said = tokenizers.metadata(slow, ROWS)
    assert said.keys() <= words
    for value in said.values():
        first = value[0] if isinstance(value, list) else value
        assert type(first) in (str, int, float, bool)


def test_a_tokenizer_must_fit_its_model(slow: Path, fast: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="has 100 rows; it is another model's tokenizer"):
        tokenizers.metadata(slow, 100)
    with pytest.raises(SourceError, match=r"needed is a tokenizer\.json or a spiece\.model"):
        tokenizers.metadata(tmp_path, ROWS)
    (slow / tokenizers.SLOW).write_bytes(b"no model")
    with pytest.raises(SourceError, match="not a"):
        tokenizers.metadata(slow, ROWS)
    for text in ('{"model": {"type": "BPE", "vocab": {}}}', '{"model": {"vocab": [["a"]]}}'):
        (fast / tokenizers.FAST).write_text(text)
        with pytest.raises(SourceError, match=r"not a Unigram model|broken vocabulary"):
            tokenizers.metadata(fast, ROWS)


HOSTILE = {
    "a token of a billion": {"added_tokens": [{"id": 10**9, "content": "a"}]},
    "a token before the first": {"added_tokens": [{"id": -1, "content": "a"}]},
    "half a letter": {"model": {"vocab": [["\ud800", -1.0]]}},
    "a score that fp32 cannot hold": {"model": {"vocab": [["a", 1e300]]}},
    "no score": {"model": {"vocab": [["a", float("nan")]]}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_vocabulary_that_no_file_can_hold_is_refused(name: str, tmp_path: Path) -> None:
    said = {"model": {"vocab": [["a", -1.0]]}} | HOSTILE[name]
    (tmp_path / tokenizers.FAST).write_text(json.dumps(said))
    with pytest.raises(SourceError, match="broken vocabulary"):
        tokenizers.metadata(tmp_path, ROWS)


def test_what_is_said_of_steps_and_the_unknown_need_not_make_sense(tmp_path: Path) -> None:
    said = {"model": {"vocab": [["a", -1.0]], "unk_id": 7}, "normalizer": {"normalizers": 5}}
    (tmp_path / tokenizers.FAST).write_text(json.dumps(said))
    assert "tokenizer.ggml.unknown_token_id" not in tokenizers.metadata(tmp_path, 1)


def test_the_folder_beside_an_encoder(slow: Path, fast: Path, tmp_path: Path) -> None:
    for name, folder in (("text_encoder", slow), ("text_encoder_2", fast)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
        assert tokenizers.folder_beside(tmp_path / name) == folder
        assert tokenizers.folder_beside(tmp_path / name / "model.safetensors") == folder
    (tmp_path / "other").mkdir()
    assert tokenizers.folder_beside(tmp_path / "other") is None
