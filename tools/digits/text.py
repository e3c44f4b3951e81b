"""The two text halves of the pipeline: small tokenizers and encoders, trained on the digit prompts.

Contract: `train_text(prompts, labels, steps)` returns frozen modules from which the digit can be
read linearly, out of CLIP's pooled vector and out of T5's mean token. `embed` runs them as
FluxPipeline does: CLIP padded to its own length, T5 to the asked length, both without a mask.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from digits.words import NOTHING, corpus

WIDTH = 64  # hidden size of both encoders: the transformer's text and pooled widths
CLIP_LENGTH = T5_LENGTH = 32
CHARACTER_SCORE = -20.0  # below any word of the corpus
PRINTABLE = [chr(code) for code in range(33, 127)]


@dataclass(frozen=True)
class TextParts:
    """Tokenizers and encoders, in FluxPipeline's order."""

    clip_tokenizer: Any
    clip: Any
    t5_tokenizer: Any
    t5: Any

    def embed(self, prompts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """(T5 sequence, CLIP pooled) of the prompts, T5 padded to `length` tokens."""
        clip_ids = _ids(self.clip_tokenizer, prompts, CLIP_LENGTH)
        t5_ids = _ids(self.t5_tokenizer, prompts, length)
        return self.t5(t5_ids)[0], self.clip(clip_ids).pooler_output


def _ids(tokenizer: Any, prompts: list[str], length: int) -> Tensor:
    batch = tokenizer(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    ids: Tensor = batch.input_ids
    return ids


def train_clip_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer of whole prompt words, with all printable characters as a fallback."""
    raw = Tokenizer(models.BPE(unk_token="<|unknown|>", end_of_word_suffix="</w>"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    letters = [char for char in PRINTABLE if not char.isupper()]
    # Declared in full, for the trainer would number the word-final letters in hash order.
    alphabet = ["<|unknown|>", "<|startoftext|>", "<|pad|>", "<|endoftext|>", *letters]
    alphabet += [f"{char}</w>" for char in letters]
    raw.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=len(alphabet) + 160,
            special_tokens=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    vocab = dict(sorted(raw.get_vocab().items(), key=lambda item: item[1]))
    merges = [tuple(pair) for pair in json.loads(raw.to_str())["model"]["merges"]]
    return CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        unk_token="<|unknown|>",
        pad_token="<|pad|>",
        model_max_length=CLIP_LENGTH,
    )


def train_t5_tokenizer() -> T5TokenizerFast:
    """A unigram tokenizer: prompt words by their frequency, printable characters as a fallback.

    The scores are counted, not fitted by EM: its pruning would cut frequent words to pieces.
    """
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁")]
    )
    counts: Counter[str] = Counter()
    for sentence in corpus():
        for cased in (sentence, sentence.capitalize()):
            counts.update(piece.rstrip(",") for piece, _ in splitter.pre_tokenize_str(cased))
    total = counts.total()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(piece, round(math.log(n / total), 4)) for piece, n in sorted(counts.items())]
    pieces += [(char, CHARACTER_SCORE) for char in ["▁", *PRINTABLE] if char not in counts]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=T5_LENGTH)


def _encoders(clip_tokenizer: Any, t5_tokenizer: Any) -> tuple[CLIPTextModel, T5EncoderModel]:
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=CLIP_LENGTH,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=WIDTH,
            d_kv=WIDTH // 2,
            d_ff=2 * WIDTH,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
    return clip, t5


def train_text(prompts: list[str], labels: list[int], steps: int) -> TextParts:
    """Tokenizers and encoders of the prompts; the encoders come back frozen."""
    clip_tokenizer, t5_tokenizer = train_clip_tokenizer(), train_t5_tokenizer()
    clip, t5 = _encoders(clip_tokenizer, t5_tokenizer)
    parts = TextParts(clip_tokenizer, clip, t5_tokenizer, t5)
    heads = nn.ModuleList([nn.Linear(WIDTH, NOTHING + 1) for _ in range(2)])
    weights = [weight for part in (clip, t5, heads) for weight in part.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=2e-3)
    targets = torch.tensor(labels)
    for step in range(steps):
        picked = torch.randint(len(prompts), (64,))
        sequence, pooled = parts.embed([prompts[int(i)] for i in picked], (16, 16, 48)[step % 3])
        loss = F.cross_entropy(heads[0](pooled), targets[picked])
        loss = loss + F.cross_entropy(heads[1](sequence.mean(1)), targets[picked])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    clip.requires_grad_(False).eval()
    t5.requires_grad_(False).eval()
    return parts
