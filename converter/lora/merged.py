"""A checkpoint with LoRAs merged into it, in fp32, as each tensor is read.

All LoRAs are added to the checkpoint's own weights, so their order does not matter.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dqconvert.converter.canonical import CanonicalSource, DerivedSource, compose, swap_halves
from dqconvert.converter.lora.match import BIAS, Loras, Patch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Share:
    """The rows start .. stop of a patch, which are those of a canonical tensor; place: among its
    parts."""

    patch: Patch
    place: int
    start: int
    stop: int

    @property
    def plain(self) -> bool:
        """Whether it is a product of two matrices whose rows are those of the tensor."""
        return self.patch.rank is not None and self.patch.home.plain

    @property
    def by_rows(self) -> bool:
        """Whether some rows of it can be made alone."""
        patch = self.patch
        columnwise = "magnitude" in patch.roles and patch.adapter.by_columns
        return patch.home.plain and patch.kind != BIAS and not columnwise


class MergedSource(DerivedSource):
    """See the module docstring; infos are those of inner, what changes is read in fp32.

    patches: those of loras that are merged, all of them unless told otherwise.
    """

    def __init__(
        self, inner: CanonicalSource, loras: Loras, patches: Sequence[Patch] | None = None
    ) -> None:
        super().__init__(inner)
        self.loras = loras
        self._last = threading.local()
        self.shares: dict[str, list[Share]] = {}
        for patch in loras.patches if patches is None else patches:
            for place, (part, start, stop) in enumerate(patch.home.rows(inner.infos)):
                self.shares.setdefault(part, []).append(Share(patch, place, start, stop))

    def read(self, name: str) -> Tensor:
        """A canonical tensor; fp32 where a LoRA changes it."""
        tensor = self.inner.read(name)
        if name not in self.shares:
            return tensor
        whole = tensor.float().contiguous()
        rows = whole.shape[0] if whole.ndim else 1
        whole = whole if whole is not tensor else tensor.clone()
        self._merge(name, whole.view(rows, -1), 0, rows)
        return whole

    def stack(self, names: Sequence[str], rows: tuple[int, int] | None = None) -> Tensor:
        """Canonical tensors stacked on rows, or rows start .. stop of the stack."""
        if self.shares.keys().isdisjoint(names):
            return self.inner.stack(names, rows)
        whole = self.inner.stack(names, rows).float()
        start, stop = rows or (0, whole.shape[0])
        first = 0
        for name in names:
            last = first + self.infos[name].shape[0]
            low, high = max(first, start), min(last, stop)
            if low < high and name in self.shares:
                part = whole[low - start : high - start]
                self._merge(name, part.view(high - low, -1), low - first, high - first)
            first = last
        return whole

    def _merge(self, name: str, whole: Tensor, start: int, stop: int) -> None:
        """Add all LoRAs to rows start .. stop of a tensor, [rows, K] fp32, in place.

        First those that look at the weight, which is still the checkpoint's own.
        """
        plain = [share for share in self.shares[name] if share.plain]
        added = [self._added(s, name, whole, start, stop) for s in self.shares[name] if not s.plain]
        for one in added:
            whole += one.reshape(whole.shape)
        for share in plain:
            share.patch.add(whole, share.start + start, share.start + stop)

    def _added(self, share: Share, name: str, base: Tensor, start: int, stop: int) -> Tensor:
        """What a patch adds to rows start .. stop, [rows, K] fp32. base: these rows."""
        if share.by_rows:
            return share.patch.added(base, share.start + start, share.start + stop)
        return self._whole(share, name)[start:stop]

    def _whole(self, share: Share, name: str) -> Tensor:
        """What a patch adds to a canonical tensor; of those in hand, the last one is kept."""
        if getattr(self._last, "share", None) is not share:
            self._last.share, self._last.added = share, self._made(share, name)
        found: Tensor = self._last.added
        return found

    def _made(self, share: Share, name: str) -> Tensor:
        """The same, [rows, K] fp32, by way of the dialect's tensor."""
        patch = share.patch
        theirs = compose(patch.home.leaf, [self.inner.read(n).float() for n in patch.home.parts])
        shape, rows = theirs.shape, patch.extent[0]
        added = patch.added(theirs.reshape(rows, -1), 0, rows).reshape(shape)
        leaf = patch.home.leaf
        if leaf.frames:
            added = added[:, :, share.place]
        elif leaf.swap:
            added = swap_halves(added)
        elif leaf.view is None:
            added = added[share.start : share.stop] if added.ndim else added
        ours = self.infos[name].shape
        return added.reshape(ours[0] if ours else 1, -1)
