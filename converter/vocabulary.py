"""The tokenizer that ComfyUI reads from an encoder's own file: one beside the source goes into it.

    spiece_model    the bytes of sentencepiece's model        UMT5, Gemma
    tekken_model    the bytes of Mistral's tekken.json        Mistral 3

Source: ComfyUI comfy/text_encoders/{wan,lumina2,lt,flux}.py. Torch-free until read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dqconvert.converter import tokenizers
from dqconvert.converter.canonical import CanonicalSource, DerivedSource
from dqconvert.formats.targets import Target
from dqconvert.quantizers.errors import SourceError
from dqconvert.quantizers.spec import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

FILES = {
    "spiece_model": ("spiece.model", "tokenizer.model", "sentencepiece.model"),
    "tekken_model": ("tekken.json",),
}
"""What holds a tensor's bytes: a tokenizer of the same kind may be called in several ways."""


class WithVocabulary(DerivedSource):
    """A model and a tensor more, [bytes of a file] uint8."""

    def __init__(self, inner: CanonicalSource, name: str, path: Path) -> None:
        super().__init__(inner)
        self._name, self._path = name, path
        self.infos = {**inner.infos, name: TensorInfo("U8", (path.stat().st_size,))}

    def read(self, name: str) -> Tensor:
        """A canonical tensor, or the file's bytes."""
        if name != self._name:
            return self.inner.read(name)
        import torch

        try:
            return torch.frombuffer(bytearray(self._path.read_bytes()), dtype=torch.uint8)
        except OSError as error:
            raise SourceError(f"{self._path}: {error.strerror}") from error

    def where(self, name: str) -> str:
        """File and tensor that a canonical tensor comes from, for messages."""
        return str(self._path) if name == self._name else self.inner.where(name)


def with_vocabulary(source: CanonicalSource, path: Path, goal: Target) -> CanonicalSource:
    """The model with its tokenizer where the target reads it from the file.

    path: of the model's file or folder. As it was where it has one, or where none lies beside.
    """
    name = source.family.vocabulary
    if not name or name in source.infos or not source.family.carries(goal.NAME, name):
        return source
    found = [
        place / file
        for place in tokenizers.places_beside(path)
        for file in FILES[name]
        if (place / file).is_file() and (place / file).stat().st_size
    ]
    return WithVocabulary(source, name, found[0]) if found else source


def names_of(name: str) -> str:
    """What the file of a tokenizer may be called, for messages."""
    return " or ".join(FILES[name])
