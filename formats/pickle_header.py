"""What torch.save wrote, without its bytes: names, shapes, and where each tensor lies in the file.

A file of torch >= 1.6 is a ZIP archive whose members are not compressed; NAME/data.pkl says which
tensor is which part of which member. It is unpickled by torch's restricted unpickler
(weights_only), which runs no code of the file, and without reading any weights. Training code
nests its state dict: see WRAPPERS.

Source: torch/serialization.py (_load; FakeTensorMode and _checkpoint_offset), docs notes on
serialization semantics.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqconvert.formats.header import Extent, Header
from dqconvert.quantizers.errors import SourceError
from dqconvert.quantizers.spec import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

EMA = ("generator_ema", "ema_model", "model_ema", "ema_state_dict", "ema", "params_ema")
WRAPPERS = (
    *EMA, "state_dict", "model_state_dict", "model_state", "module", "model", "generator",
    "net", "params", "dit", "transformer", "diffusion_model",
)  # fmt: skip
"""Keys under which state dicts lie, the one that is taken first: averaged weights are what
training code itself runs."""

INSIDE = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")
"""Parts of names that wrappers of torch put anywhere."""

DEPTH = 8
"""How deep state dicts are looked for."""

_UNREADABLE = (
    RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, OSError,
    AssertionError, ImportError, MemoryError, RecursionError, OverflowError, zipfile.BadZipFile,
)  # fmt: skip
"""What torch raises on archives that are none."""


@dataclass(frozen=True, slots=True)
class PickleHeader(Header):
    """strides: of tensors whose elements do not lie in order; chosen: the keys that lead to the
    state dict; passed: the other state dicts beside it.
    """

    strides: Mapping[str, tuple[int, ...]]
    chosen: str
    passed: tuple[str, ...]


def read(path: Path) -> PickleHeader:
    """The header of a file.

    Raises SourceError where the file is missing, cut off, of an old torch, where it holds more
    than tensors in dicts, or no state dict at all.
    """
    _check_archive(path)
    chosen, state, passed = _state_dict(_load(path), "")
    size = path.stat().st_size
    extents: dict[str, Extent] = {}
    strides: dict[str, tuple[int, ...]] = {}
    for key, tensor in state.items():
        name = ".".join(part for part in key.split(".") if part not in INSIDE)
        if name in extents:
            raise SourceError(f"{path}: tensor {name} is there twice, in wrappers and without")
        extents[name] = extent = _extent(path, key, tensor)
        if extent.info.numel and extent.offset + span(tensor) * tensor.element_size() > size:
            raise SourceError(f"{path}: cut off inside tensor {key}; download it again")
        if not tensor.is_contiguous():
            strides[name] = tuple(tensor.stride())
    if not extents:
        raise SourceError(f"{path}: holds no state dict, that is no tensors by name")
    return PickleHeader(extents, {}, size, strides, chosen, passed)


def span(tensor: Tensor) -> int:
    """How many elements of its storage a tensor reaches over."""
    return 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def _check_archive(path: Path) -> None:
    """A ZIP archive whose members are stored as they are."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [one.filename for one in archive.infolist() if one.compress_type]
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}") from error
    except _UNREADABLE as error:
        raise SourceError(
            f"{path}: no archive of torch.save, or cut off ({error}); download it again, or if it "
            "was saved by a torch before 1.6, load it there and save it as .safetensors"
        ) from error
    if packed:
        raise SourceError(f"{path}: {packed[0]} is compressed, which torch.save does not do")


def _load(path: Path) -> Any:
    """The object in a file, its tensors without their bytes."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        told = next((one for one in reason.split(". ") if "GLOBAL" in one or "global" in one), "")
        raise SourceError(
            f"{path}: is not only tensors ({(told or reason)[:160]}), so loading it would run code "
            "of the file; none was run. Where you trust it, save its state dict as .safetensors"
        ) from error
    except _UNREADABLE as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SourceError(f"{path}: torch cannot read it ({reason[:160]})") from error


def _state_dict(found: Any, at: str) -> tuple[str, dict[str, Tensor], tuple[str, ...]]:
    """The keys that lead to the state dict, that itself, and the keys of others beside it."""
    import torch

    passed: list[str] = []
    for _ in range(DEPTH):
        if not isinstance(found, Mapping):
            return at, {}, ()
        own = {str(k): v for k, v in found.items() if isinstance(v, torch.Tensor)}
        inner = {str(k): v for k, v in found.items() if isinstance(v, Mapping) and _holds(v)}
        named = [key for key in WRAPPERS if key in inner]
        if not inner or (own and not named) or sum("." in key for key in own) > len(inner):
            return at, own, tuple(passed)
        key = next(iter(named or inner))
        passed += [f"{at}{other}" for other in inner if other in WRAPPERS and other != key]
        at, found = f"{at}{key}.", inner[key]
    return at, {}, ()


def _holds(found: Mapping[Any, Any], depth: int = DEPTH) -> bool:
    """Whether a dict holds tensors by name, at any depth."""
    return any(_is_held(value, depth) for key, value in found.items() if isinstance(key, str))


def _is_held(value: Any, depth: int) -> bool:
    import torch

    if isinstance(value, Mapping):
        return depth > 0 and _holds(value, depth - 1)
    return isinstance(value, torch.Tensor)


def _extent(path: Path, name: str, tensor: Tensor) -> Extent:
    """Where a tensor lies. SourceError for what no file of weights holds."""
    import torch

    from dqconvert.quantizers.tensors import DTYPE_NAMES

    dtype = DTYPE_NAMES.get(tensor.dtype)
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_neg():
        what = "negated lazily" if tensor.is_neg() else f"{tensor.layout}, {tensor.dtype}"
        raise SourceError(
            f"{path}: tensor {name} is {what}, and cannot be read; save it as a plain tensor"
        )
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if dtype is None or (offset is None and tensor.numel()):
        raise SourceError(f"{path}: tensor {name} is {tensor.dtype}, and cannot be read")
    first = (offset or 0) + int(tensor.storage_offset()) * tensor.element_size()
    return Extent(TensorInfo(dtype, tuple(tensor.shape)), first)


def keys(header: PickleHeader) -> Iterator[str]:
    """What the user should know of the state dict that was taken."""
    if header.passed:
        averaged = header.chosen.split(".")[-2] in EMA
        what = "the averaged weights" if averaged else "the weights"
        yield f"{what} under {header.chosen[:-1]} were taken, not {', '.join(header.passed)}"
