"""The scheduler: who runs when, and how everything ends."""

from __future__ import annotations

import _thread
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dqconvert.calibration.lockstep import Lockstep, Resident

NAMES = ("a", "b", "c")
BLOCKS = {name: name.upper() for name in NAMES}


class Recorder:
    """A residency that writes down what happens, beside what the tasks write."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.inside: str | None = None

    def enter(self, name: str, module: str) -> None:
        assert module == name.upper()
        assert self.inside is None
        self.inside = name
        self.log.append(f"+{name}")

    def leave(self, name: str, module: str) -> None:
        assert self.inside == name
        self.inside = None
        self.log.append(f"-{name}")

    @property
    def entered(self) -> str:
        return "".join(word[1] for word in self.log if word[0] == "+")


@pytest.fixture(autouse=True)
def no_thread_survives() -> Iterator[None]:
    yield
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("lockstep")]
    assert not left


def walk(lockstep: Lockstep[str], seen: Recorder, index: int, path: str) -> Callable[[], int]:
    """A task that passes the blocks of a path and returns its index."""

    def task() -> int:
        for block in path:
            lockstep.arrive(block)
            assert seen.inside == block, "a block is entered before it is run through"
            seen.log.append(f"{index}{block}")
        return index

    return task


def run(paths: Sequence[str]) -> Recorder:
    seen = Recorder()
    lockstep = Lockstep(BLOCKS, seen)
    tasks = [walk(lockstep, seen, index, path) for index, path in enumerate(paths)]
    assert lockstep.run(tasks) == list(range(len(paths)))
    return seen


def test_each_block_is_entered_once_for_all_and_tasks_pass_in_order() -> None:
    seen = run(["abc", "abc", "abc"])
    assert seen.log == [
        word
        for name in NAMES
        for word in (f"+{name}", f"0{name}", f"1{name}", f"2{name}", f"-{name}")
    ]


def test_several_calls_a_step_and_early_finishers() -> None:
    seen = run(["abcabcabc", "abc", "abcabc", ""])
    assert seen.entered == "abcabcabc"
    assert seen.log.count("1a") == 1 and seen.log.count("0a") == 3


def test_those_behind_catch_up() -> None:
    """Task 0 skips a block, is ahead, and waits until the other has come up to it."""
    seen = run(["cabc", "abcabc"])
    assert seen.entered == "abcabc"


def test_nothing_to_run() -> None:
    assert Lockstep(BLOCKS, Resident()).run([]) == []


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.text(alphabet="abc", max_size=8), max_size=5))
def test_any_paths_are_walked_completely_and_in_order(paths: list[str]) -> None:
    seen = run(paths)
    for index, path in enumerate(paths):
        own = "".join(word[1] for word in seen.log if word[0] == str(index))
        assert own == path


def test_one_thread_at_a_time() -> None:
    """An unprotected counter would show two tasks that run at once."""
    inside = 0
    lockstep = Lockstep(BLOCKS, Resident())

    def task() -> None:
        nonlocal inside
        for block in "abc" * 5:
            inside += 1
            assert inside == 1
            time.sleep(0.0005)
            inside -= 1
            lockstep.arrive(block)

    lockstep.run([task] * 8)


def test_gradients_are_off_in_every_task() -> None:
    def task() -> bool:
        lockstep.arrive("a")
        return torch.is_grad_enabled()

    lockstep = Lockstep(BLOCKS, Resident())
    assert lockstep.run([task] * 3) == [False] * 3
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("when", [0, 1, 2])
@pytest.mark.parametrize("who", [0, 2])
def test_a_task_that_raises_stops_all(who: int, when: int) -> None:
    seen = Recorder()
    lockstep = Lockstep(BLOCKS, seen)
    unwound = []

    def task(index: int) -> None:
        try:
            for step, block in enumerate("abc"):
                if (index, step) == (who, when):
                    raise ValueError(f"task {index}")
                lockstep.arrive(block)
        finally:
            unwound.append(index)

    with pytest.raises(ValueError, match=f"task {who}"):
        lockstep.run([lambda index=index: task(index) for index in range(4)])  # type: ignore[misc]
    started = who + 1 if when == 0 else 4
    assert sorted(unwound) == list(range(started)), "the clean-up of every started task ran"
    assert seen.inside is None, "the block was left"


def test_a_task_cannot_swallow_the_stop() -> None:
    lockstep = Lockstep(BLOCKS, Resident())

    def stubborn() -> None:
        for _ in range(3):
            try:
                lockstep.arrive("a")
            except Exception:  # noqa: BLE001 - as a library might
                pytest.fail("the stop is no Exception")

    def failing() -> None:
        lockstep.arrive("a")
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        lockstep.run([stubborn, failing, stubborn])


@pytest.mark.parametrize("method", ["enter", "leave"])
def test_a_residency_that_raises_stops_all(method: str) -> None:
    class Failing(Resident):
        pass

    def fail(name: str, module: object) -> None:
        if name == "b":
            raise MemoryError(name)

    residency = Failing()
    setattr(residency, method, fail)
    lockstep = Lockstep(BLOCKS, residency)
    seen = Recorder()
    seen.inside = "any"

    def task() -> None:
        for block in "abc":
            lockstep.arrive(block)
            seen.log.append(block)

    with pytest.raises(MemoryError):
        lockstep.run([task] * 3)
    assert "c" not in seen.log


def test_ctrl_c_in_the_main_thread_releases_all() -> None:
    lockstep = Lockstep(BLOCKS, Resident())
    unwound = []

    def task(index: int) -> None:
        try:
            for step in range(1000):
                lockstep.arrive("abc"[step % 3])
                if (index, step) == (1, 4):
                    _thread.interrupt_main()
                time.sleep(0.001)
        finally:
            unwound.append(index)

    with pytest.raises(KeyboardInterrupt):
        lockstep.run([lambda index=index: task(index) for index in range(3)])  # type: ignore[misc]
    assert sorted(unwound) == [0, 1, 2]


def test_a_second_run_of_the_same_lockstep_works() -> None:
    lockstep = Lockstep(BLOCKS, Resident())

    def failing() -> None:
        lockstep.arrive("a")
        raise ValueError

    def task() -> int:
        lockstep.arrive("c")
        return lockstep.index

    with pytest.raises(ValueError):
        lockstep.run([failing])
    assert lockstep.run([task, task]) == [0, 1]


def test_mistakes_of_the_caller() -> None:
    lockstep = Lockstep(BLOCKS, Resident())
    with pytest.raises(RuntimeError, match="lock-step"):
        lockstep.arrive("a")
    with pytest.raises(KeyError, match="'z'"):
        lockstep.run([lambda: lockstep.arrive("z")])
