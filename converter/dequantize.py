"""A quantized file back to a plain bf16 checkpoint, in the dialect that the source had.

What was folded and centered is unfolded again, so that LoRAs of the original fit.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dqconvert.converter.canonical import compose, composed_info, entries_of
from dqconvert.converter.dequantized import plain_weights
from dqconvert.converter.family import fill, leaves
from dqconvert.converter.reopen import reopen
from dqconvert.formats.writer import StreamWriter
from dqconvert.quantizers.errors import OutputError, SourceError
from dqconvert.quantizers.spec import TensorInfo


def dequantize(out: Path, output: Path, overwrite: bool = False) -> Path:
    """Write the checkpoint; returns its path.

    Raises SourceError where the file is broken, OutputError where the output exists.
    """
    if output.suffix != ".safetensors":
        raise OutputError(f"{output}: must end in .safetensors")
    if output.exists() and not overwrite:
        raise OutputError(f"{output}: exists; choose another -o, or give --overwrite")
    found = reopen(out)
    problems = found.unreadable()
    if problems:
        raise SourceError(f"{out}: {len(problems)} problems, the first: {problems[0]}")
    weights = plain_weights(found)
    held = {name: replace(info, dtype="BF16") for name, info in weights.infos.items()}
    dialect = found.manifest.dialect
    infos: dict[str, TensorInfo] = {}
    plan = []
    for entry, index in entries_of(found.family, dialect, held):
        for leaf in leaves(entry):
            ours = [fill(name, index) for name in leaf.ours]
            if ours[0] not in held:
                continue
            name = fill(leaf.theirs, index)
            infos[name] = composed_info(leaf, [held[one] for one in ours])
            plan.append((name, leaf, ours))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output.parent}: no folder to write to ({error.strerror})") from error
    with StreamWriter(output, infos, {"format": "pt"}) as writer:
        for name, leaf, ours in plan:
            writer.write(name, compose(leaf, [weights.read(one).bfloat16() for one in ours]))
    return output
