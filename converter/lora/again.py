"""The LoRAs that a manifest names, merged once more to compare with. Torch-free."""

from __future__ import annotations

from pathlib import Path

from dqconvert.converter.canonical import CanonicalSource
from dqconvert.converter.lora.apply import Recorded
from dqconvert.converter.lora.files import LoraFile, LoraSpec, opened
from dqconvert.converter.lora.match import read
from dqconvert.converter.lora.merged import MergedSource
from dqconvert.converter.manifest_reader import Manifest
from dqconvert.quantizers.errors import DQConvertError, SourceError


def again(source: CanonicalSource, manifest: Manifest, where: Path) -> CanonicalSource:
    """A model with the LoRAs that a manifest names merged once more. where: for messages.

    Raises SourceError that says what is missing or was changed.
    """
    if not manifest.loras:
        return source
    files = [_same(one, where) for one in manifest.loras]
    skipped = {base for one in manifest.loras for base in one.skipped}
    partial = any(one.partial for one in manifest.loras)
    loras = read(files, source, manifest.component.partition(".")[0], partial)
    kept = [patch for patch in loras.patches if patch.base not in skipped]
    return MergedSource(source, loras, kept)


def _same(recorded: Recorded, where: Path) -> LoraFile:
    """The file that was merged, if it is still what it was."""
    needed = (
        f"{where}: made with the LoRA {recorded.path} (SHA-256 {recorded.sha256}); to compare, "
        "put that file there"
    )
    try:
        file = opened(LoraSpec(Path(recorded.path), recorded.strength))
    except DQConvertError as error:
        raise SourceError(f"{needed} ({error})") from error
    if file.sha256 != recorded.sha256:
        raise SourceError(f"{needed}: what is there now is another file")
    return file
