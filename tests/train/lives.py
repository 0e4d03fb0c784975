"""Trainings that are killed: each life of a run is a process of its own, and SIGKILL ends it at a chosen moment.

A life dies in the midst of a named call, so that the moment is the same on every machine. Processes are forked from a
server that has imported the training already and computed nothing, which costs a tenth of a fresh interpreter.
"""

import multiprocessing
import os
import pkgutil
import signal
import stat
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from dinov2.engine.checkpoint import CheckpointStore
from dinov2.engine.metrics import read_metrics
from dinov2.engine.run_folder import RunFolder
from dinov2.train.train import train
from tests.train.tiny_run import tiny_config

__all__ = ["Moment", "NthFileOperation", "equals", "live", "remains"]

_TIMES = {"iter_time", "data_time", "health_time", "images_per_second"}
_FILE_OPERATIONS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"}


@dataclass(frozen=True)
class Moment:
    """When a life ends: calls as (`module:name`, how many-th), each counted from the beginning of the one before.

    The process dies before or after the last of them, or halfway: then half of the file that the call syncs is there,
    or half of the line that it writes.
    """

    calls: tuple[tuple[str, int], ...]
    when: Literal["before", "after", "halfway"] = "before"

    def arm(self) -> None:
        """Prepares this process to die there."""
        (target, nth), inner = self.calls[0], self.calls[1:]
        reached = Moment(inner, self.when).arm if inner else None
        _on_call(target, nth, lambda honest: _armed(honest, reached) if reached else self._dying(honest))

    def _dying(self, honest: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self.when == "halfway" and isinstance(arguments[0], int):  # os.fsync
                os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
            elif self.when != "before":
                honest(*arguments, **options)
            if self.when == "halfway" and not isinstance(arguments[0], int):  # a writer of metrics
                path = arguments[0].path
                os.truncate(path, path.stat().st_size - 40)
            _die()

        return call


@dataclass(frozen=True)
class NthFileOperation:
    """The end comes before the n-th operation on files in the run's folder that Python makes, syncs included."""

    folder: Path
    nth: int

    def arm(self) -> None:
        """Prepares this process to die there."""
        seen = 0

        def one_more(half_synced: int | None = None) -> None:
            nonlocal seen
            seen += 1
            if seen == self.nth:
                if half_synced is not None and stat.S_ISREG(os.fstat(half_synced).st_mode):
                    os.ftruncate(half_synced, os.fstat(half_synced).st_size // 2)
                _die()

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            if event in _FILE_OPERATIONS and isinstance(arguments[0], str | bytes | os.PathLike):
                path = os.fsdecode(arguments[0])
                # A name without a folder comes from a removal that holds its folder open.
                if path.startswith(str(self.folder)) or (event in ("os.remove", "os.rmdir") and "/" not in path):
                    one_more()

        honest = os.fsync

        def fsync(descriptor: int) -> None:
            one_more(half_synced=descriptor)
            honest(descriptor)

        os.fsync = fsync
        sys.addaudithook(watch)


def live(run: Path, *overrides: str, images: Path | None = None, until: Moment | NthFileOperation | None = None) -> int:
    """Runs the tiny training in a process of its own; the exit code, which is minus the signal that ended it.

    `images` is a folder in place of the toy pictures. What the process says is in `<run>.log`.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    process = processes.Process(target=_live, args=(run, overrides, images, until))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), run.with_suffix(".log").read_text()
    return process.exitcode


def remains(run: Path) -> dict[str, Any]:
    """What a run computed: every logged number but the times, every bit of the last checkpoint and of the teachers."""
    store = CheckpointStore(run / "checkpoints")
    step = store.latest()
    assert step is not None
    rows = read_metrics(run / "training_metrics.json")
    teachers = {file.parent.name: torch.load(file) for file in run.glob("eval/*/teacher_checkpoint.pth")}
    unreadable = RunFolder(run).read_unreadable()
    return {
        "step": step,
        "metrics": [{key: value for key, value in row.items() if key not in _TIMES} for row in rows],
        "checkpoint": dict(_leaves(store.load(step))),
        "teachers": dict(_leaves(teachers)),
        "backbones": dict(_leaves({file.parent.name: load_file(file) for file in run.glob("eval/*/*.safetensors")})),
        "unreadable": [Path(path).name for path in unreadable],
    }


def equals(run: Path, unbroken: Path) -> None:
    """Asserts that a run computed what the unbroken one did, bit for bit, and left nothing else behind."""
    found, expected = remains(run), remains(unbroken)
    for part in expected:
        if isinstance(expected[part], dict):
            differing = [key for key in expected[part] if found[part].get(key) != expected[part][key]]
            assert not differing, f"{part} of {run}: {len(differing)} differ, among them {differing[:5]}"
        assert found[part] == expected[part], part


def _live(run: Path, overrides: tuple[str, ...], images: Path | None, until: Moment | NthFileOperation | None) -> None:
    with open(run.with_suffix(".log"), "a", buffering=1, encoding="utf-8") as log:
        sys.stdout = sys.stderr = log
        multiprocessing.set_start_method("fork", force=True)  # of loader workers: they inherit what is imported
        try:
            cfg = tiny_config(*overrides, folder=images)
            if until is not None:
                until.arm()
            train(cfg, run)
        except BaseException:
            traceback.print_exc()
            sys.exit(1)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _on_call(target: str, nth: int, replacement: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """The `nth` call of `module:name` from now on goes to a replacement, made of the honest function."""
    module, _, name = target.partition(":")
    *path, attribute = name.split(".")
    owner = pkgutil.resolve_name(f"{module}:{'.'.join(path)}" if path else module)
    honest, calls = getattr(owner, attribute), 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return (replacement(honest) if calls == nth else honest)(*arguments, **options)

    setattr(owner, attribute, call)


def _armed(honest: Callable[..., Any], arm: Callable[[], None]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        arm()
        return honest(*arguments, **options)

    return call


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every number of a nested state by its path; tensors as type, shape and bytes, so that NaN equals NaN."""
    match value:
        case torch.Tensor():
            flat = value.detach().contiguous().flatten()
            yield path, (value.dtype, tuple(value.shape), flat.view(torch.uint8).numpy().tobytes())
        case dict():
            for key, item in value.items():
                yield from _leaves(item, f"{path}.{key}")
        case list() | tuple():
            for index, item in enumerate(value):
                yield from _leaves(item, f"{path}.{index}")
        case _:
            yield path, value
