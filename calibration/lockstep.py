"""Many runs of one network, side by side, so that each block is entered once for all of them.

Each task runs in a thread of its own and calls `arrive(block)` at every block's boundary. The
caller's thread conducts: it lets one thread run at a time, so the tasks need no locks.

    run every task to its first boundary
    while a task waits at a boundary:
        block = the first in order at which one waits     those behind catch up with the others
        residency.enter(block)                            the seam: load its weights
        let the tasks that wait there run, one after another, to their next boundary
        residency.leave(block)                            drop them again

Contract: a task sees the same computations as alone, in the same order. Tasks may be at different
blocks, call the network any number of times, and finish at any time. The first exception, of a
task, of the residency or Ctrl-C in the caller, stops all: the others are unwound at their next
boundary, every thread is joined, and the exception is raised once. Gradients are off.
`tests/test_lockstep.py` holds it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import Generic, Protocol, TypeVar

import torch

S = TypeVar("S")
T = TypeVar("T")
M = TypeVar("M")
ModuleT = TypeVar("ModuleT", contravariant=True)


def drain(steps: Generator[S, None, T], each: Callable[[S], object]) -> T:
    """Hand every step to a function, and return the generator's result."""
    with closing(steps):
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                result: T = end.value
                return result
            each(step)


class Residency(Protocol[ModuleT]):
    """Decides where a block's weights are while no task runs through it."""

    def enter(self, name: str, module: ModuleT) -> None:
        """Make the block ready to run."""

    def leave(self, name: str, module: ModuleT) -> None:
        """The block is not needed until it is entered again."""


class Resident:
    """Everything fits: all blocks stay where they are."""

    def enter(self, name: str, module: object) -> None:
        """Nothing to do."""

    def leave(self, name: str, module: object) -> None:
        """Nothing to do."""


class _Stopped(BaseException):
    """Unwinds a task that is not to go on. No Exception, so that no library swallows it."""


class _Worker(Generic[T]):
    """A task, its thread, and where it stands; block is None while it runs and after its end."""

    def __init__(self, index: int, task: Callable[[], T]) -> None:
        self.index, self.task = index, task
        self.block: str | None = None
        self.stop = False
        self.results: list[T] = []
        self.error: BaseException | None = None
        self.go = threading.Semaphore(0)
        self.done = threading.Semaphore(0)
        self.thread: threading.Thread | None = None

    def advance(self, bind: Callable[[_Worker[T]], None]) -> None:
        """Run the task to its next boundary or its end; raises what it raises."""
        self.block = None
        if self.thread is None:
            name = f"lockstep-{self.index}"
            thread = threading.Thread(target=self._run, args=(bind,), name=name, daemon=True)
            thread.start()
            self.thread = thread
        self.go.release()
        while not self.done.acquire(timeout=1.0):  # a wait without end hides Ctrl-C on Windows
            pass
        if self.error is not None:
            raise self.error

    def wait(self, block: str) -> None:
        """Called by the task: stand at a boundary until it is let through."""
        if not self.stop:
            self.block = block
            self.done.release()
            self.go.acquire()
        if self.stop:
            raise _Stopped

    def release(self) -> None:
        """Unwind the task, wherever it stands."""
        self.stop = True
        self.go.release()

    def join(self) -> None:
        """Wait for the end of the thread."""
        if self.thread is not None:
            self.thread.join()

    def _run(self, bind: Callable[[_Worker[T]], None]) -> None:
        self.go.acquire()
        if self.stop:
            return
        try:
            bind(self)
            with torch.no_grad():  # a switch of each thread
                self.results.append(self.task())
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again in the caller
            self.error = error
        finally:
            self.done.release()


class Lockstep(Generic[M]):
    """Runs tasks in lock-step over named blocks, which are given in the order of the network."""

    def __init__(self, blocks: Mapping[str, M], residency: Residency[M]) -> None:
        self._blocks = blocks
        self._order = {name: place for place, name in enumerate(blocks)}
        self._residency = residency
        self._local = threading.local()

    @property
    def index(self) -> int:
        """Which task is asking."""
        return self._current().index

    def arrive(self, block: str) -> None:
        """Called by a task before it runs through a block: returns when it may."""
        if block not in self._order:
            raise KeyError(f"'{block}' is none of the blocks in lock-step")
        self._current().wait(block)

    def run(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """The results of all tasks, in their order."""
        return drain(self.passes(tasks), lambda block: None)

    def passes(self, tasks: Sequence[Callable[[], T]]) -> Generator[str, None, list[T]]:
        """The same, with the name of each block that was passed. To close it stops all tasks."""
        workers = [_Worker(index, task) for index, task in enumerate(tasks)]
        try:
            for worker in workers:
                worker.advance(self._bind)
            while waiting := {worker.block for worker in workers if worker.block is not None}:
                block = min(waiting, key=self._order.__getitem__)
                self._pass(block, workers)
                yield block
        finally:
            for worker in workers:
                worker.release()
            for worker in workers:
                worker.join()
        return [result for worker in workers for result in worker.results]

    def _pass(self, block: str, workers: Sequence[_Worker[T]]) -> None:
        """Let every task that waits at a block through it."""
        module = self._blocks[block]
        self._residency.enter(block, module)
        try:
            for worker in [worker for worker in workers if worker.block == block]:
                worker.advance(self._bind)
        finally:
            self._residency.leave(block, module)

    def _bind(self, worker: _Worker[T]) -> None:
        self._local.worker = worker

    def _current(self) -> _Worker[object]:
        worker: _Worker[object] | None = getattr(self._local, "worker", None)
        if worker is None:
            raise RuntimeError("only a task that runs in lock-step can ask for its place")
        return worker
