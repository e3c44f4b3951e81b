"""SHA-256 of a file while it is being written, by a thread that follows what is already there."""

from __future__ import annotations

import errno
import hashlib
import os
import threading

CHUNK = 1 << 20


class FollowingHash:
    """Hashes a file of known size from its start to the end, never past what is written.

    written(offset, size) tells of finished regions, in any order, from any thread; digest()
    waits for the end and raises the OSError that stopped it. stop() gives up.
    """

    def __init__(self, fd: int, size: int) -> None:
        self._fd, self._size = fd, size
        self._regions: dict[int, int] = {}
        self._ready = 0
        self._stopped = False
        self._changed = threading.Condition()
        self._hash = hashlib.sha256()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def written(self, offset: int, size: int) -> None:
        """A region is on file."""
        with self._changed:
            self._regions[offset] = size
            while self._ready in self._regions:
                self._ready += self._regions.pop(self._ready)
            self._changed.notify()

    def stop(self) -> None:
        """Abandon the file."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def digest(self) -> str:
        """The SHA-256 of the whole file, in hexadecimal."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._hash.hexdigest()

    def _follow(self) -> None:
        try:
            self._read()
        except OSError as error:
            self._error = error

    def _read(self) -> None:
        done, buffer = 0, memoryview(bytearray(CHUNK))
        while done < self._size:
            with self._changed:
                self._changed.wait_for(lambda at=done: self._stopped or self._ready > at)  # type: ignore[misc]
                if self._stopped:
                    return
                ready = self._ready
            while done < ready:
                count = os.preadv(self._fd, [buffer[: ready - done]], done)
                if count == 0:
                    raise OSError(errno.EIO, "became shorter while it was being written")
                self._hash.update(buffer[:count])
                done += count
