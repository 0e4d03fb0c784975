"""Commands in forks of one process that has imported everything: a few hundred in the time of ten fresh interpreters.

`Forks` starts the process (`python -m tests.fuzz.forks`) and sends it cases, `Case`; each runs in a child of its own
with a time limit, a memory limit, a working folder, and an audit hook that notes every program started, every
connection, and every file written outside the places where a command may write. `fault` is the judgement of the result.
"""

import atexit
import contextlib
import errno
import gc
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["LOADED", "MEMORY", "SECONDS", "Case", "Forks", "Outcome", "fault"]

SECONDS = 20.0
"""A command that takes longer hangs."""
MEMORY = 2 << 30
"""Largest resident memory of a command, with what the interpreter and torch hold."""

LOADED = "dinov2.load took it"
"""A line of the output of a case whose `loads` was loaded."""

_CRASH = 70
_MORE_ADDRESSES = 6 << 30  # so that an allocation that is absurd fails instead of taking the machine down
# Events of the file system: how many of their arguments are paths, and where the folder is given as a descriptor.
_WRITES = {"os.mkdir": (1, 2), "os.rename": (2, 2), "os.remove": (1, 1), "os.rmdir": (1, 1), "os.symlink": (2, 2)}
_WRITES |= {"os.link": (2, 2), "os.truncate": (1, 9), "os.chmod": (1, 2), "os.chown": (1, 3)}
_PROGRAMS = "subprocess.Popen os.system os.exec os.posix_spawn os.spawn os.forkpty pty.spawn os.startfile".split()
_DEVICES = ("/dev/null", "/dev/full", "/dev/zero", "/dev/tty")
_REFUSAL = re.compile(r"dinov2( [\w-]+)*: ")
_LOG_LINE = re.compile(r"\d\d:\d\d:\d\d |\s*$")
_PYTHON_WARNING = re.compile(r"^\S+\.py:\d+: \w*Warning: .*", re.MULTILINE)


@dataclass(frozen=True)
class Case:
    """What is run: first `dinov2.load` of `loads` where that is not empty, then the command line `words`."""

    name: str
    words: Sequence[str]
    folder: str
    """Current folder of the command."""
    places: Sequence[str] = ("out", "runs", "cache", "tmp")
    """Folders in it in which results may be written; none stands for all of it."""
    loads: str = ""
    encoding: str = "utf-8"
    """Of standard output and standard error."""
    processes: int = 0
    """How many loader processes may be started."""


class Outcome(NamedTuple):
    """How a case ended."""

    code: int
    """Exit code; negative for the signal that ended it."""
    out: str
    err: str
    seconds: float
    memory: int
    """Largest resident memory in bytes."""
    events: tuple[str, ...]
    """Programs started, and files written where none belong."""


def fault(outcome: Outcome) -> str | None:
    """What is wrong with the way in which a command ended, or None.

    Right is: exit code 0, or 1 or 2 with one sentence on standard error; no traceback, no warning of a library with
    its line of code, no program started, nothing written outside the output folders, in the limits of time and memory.
    """
    text = f"{outcome.out}\n{outcome.err}"
    lines = [line for line in outcome.err.splitlines() if not _LOG_LINE.match(line)]
    refusals = [line for line in lines if _REFUSAL.match(line)]
    if outcome.seconds > SECONDS:
        return f"hangs: stopped after {outcome.seconds:.0f} s; {_end(text)}"
    if "Traceback (most recent call last)" in text or outcome.code == _CRASH:
        return f"traceback: {_end(text)}"
    if outcome.code not in (0, 1, 2):
        return f"exit code {outcome.code}: {_end(text)}"
    if outcome.events:
        return "; ".join(outcome.events[:3])
    if outcome.memory > MEMORY:
        return f"takes {outcome.memory >> 20} MiB of memory; {_end(text)}"
    if warning := _PYTHON_WARNING.search(text):
        return f"warning of a library: {warning[0]}"
    if outcome.code and not refusals:
        return f"exit code {outcome.code} without a sentence: {_end(text)}"
    if outcome.code == 2 and len(refusals) > 1:
        return f"{len(refusals)} sentences: {refusals}"
    if outcome.code and lines[-1] != refusals[-1]:
        return f"more than one line: {lines[-3:]}"
    if refusals and len(max(refusals, key=len)) > 8000:
        return f"a sentence of {len(max(refusals, key=len))} characters: {refusals[0][:300]}"
    return None


def _end(text: str) -> str:
    """What a text says last; of a traceback the error and the lines of this package that led to it."""
    _, found, trace = text.rpartition("Traceback (most recent call last)")
    if not found:
        return " | ".join(line.strip() for line in text.splitlines() if line.strip())[-400:]
    error = [line for line in trace.splitlines()[1:] if line[:1].strip()]
    places = re.findall(r'/(dinov2/\S+\.py)", line (\d+), in (\w+)', trace)
    where = " < ".join(f"{file}:{line} {function}" for file, line, function in reversed(places[-4:]))
    return f"{' | '.join(error)[:300]} in {where}"


class Forks:
    """The process that forks, as a context manager; `run` sends it one case."""

    def __init__(self, *modules: str) -> None:
        self._modules = modules

    def __enter__(self) -> "Forks":
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [sys.executable, "-m", "tests.fuzz.forks", *self._modules]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def run(self, case: Case) -> Outcome:
        """Runs a case to its end; one that seems to hang is given a second chance, as the machine may be busy."""
        outcome = self._run(case)
        return self._run(case) if outcome.seconds > SECONDS else outcome

    def _run(self, case: Case) -> Outcome:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(case)).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the process that forks has ended"
        values = json.loads(answer)
        return Outcome(**{**values, "events": tuple(values["events"])})


# What follows runs in the process that forks and in its children.


@dataclass
class _Watch:
    """What the audit hook does; nothing until a child has set `active`."""

    active: bool = False
    folder: str = ""
    places: Sequence[str] = ()
    processes: int = 0
    events: int = -1
    noted: set[str] = field(default_factory=set)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "os.fork":
            self.processes -= 1
        if event in _PROGRAMS or self.processes < 0:
            self.processes = max(self.processes, 0)
            self._note(f"starts a program: {event} {str(arguments)[:200]}")
            raise PermissionError(errno.EPERM, "no program may be started")
        if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(arguments[1], tuple)):
            raise OSError(errno.ENETUNREACH, "Network is unreachable")
        if event == "open":
            path, mode, flags = arguments
            writes = any(letter in mode for letter in "wax+") if mode else flags & (os.O_WRONLY | os.O_CREAT)
            if writes:
                self._check(event, path)
        elif event in _WRITES:
            n_paths, place = _WRITES[event]
            for path in arguments[n_paths - 1 : n_paths]:  # of two paths the new one
                self._check(event, path, *arguments[place : place + 1])

    def _check(self, event: str, path: Any, folder: int = -1) -> None:
        if isinstance(path, int):
            return
        below = "" if folder == -1 else os.readlink(f"/proc/self/fd/{folder}")
        name = os.path.abspath(os.path.join(below, os.fsdecode(path)))
        first = os.path.relpath(name, self.folder).split(os.sep)[0]
        if (
            name not in _DEVICES
            and not name.startswith("/proc/")
            and (first == os.pardir or (self.places and first not in self.places))
        ):
            self._note(f"writes outside its output folder: {event} {name!r}")
            raise PermissionError(errno.EACCES, "Permission denied", name)

    def _note(self, text: str) -> None:
        if text not in self.noted:
            self.noted.add(text)
            os.write(self.events, json.dumps(text).encode() + b"\n")


def _child(case: Case, streams: Sequence[int], watch: _Watch) -> None:
    """Runs the case in this process, which is a fork, and ends it."""
    os.setsid()
    folder = Path(case.folder)
    os.chdir(folder)
    for number, stream in enumerate((os.open(os.devnull, os.O_RDONLY), *streams)):
        os.dup2(stream, number)
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))
    # As Python opens them, except for the encoding.
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), case.encoding, "strict")
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(2, "w", closefd=False)), case.encoding, "backslashreplace", line_buffering=True
    )
    for name in ("home", "tmp", "cache"):
        (folder / name).mkdir(exist_ok=True)
    os.environ.update(
        HOME=str(folder / "home"),
        TMPDIR=str(folder / "tmp"),
        DINOV2_CACHE=str(folder / "cache"),
        XDG_CACHE_HOME=str(folder / "home"),
    )
    _limit()
    watch.folder, watch.places, watch.processes, watch.active = str(folder), case.places, case.processes, True
    code = _CRASH
    try:
        code = _ran(case)
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        # What a normal end does: wait for threads, then run what was registered.
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _limit() -> None:
    import resource

    addresses = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (addresses + _MORE_ADDRESSES,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _ran(case: Case) -> int:
    """Exit code of the command; `features IMAGE MODEL` stands for a call from Python."""
    from dinov2 import load
    from dinov2.cli import main
    from dinov2.errors import DinoError

    if case.loads:
        try:
            load(case.loads, device="cpu")
            print(LOADED)
        except DinoError as error:
            if len(str(error).splitlines()) != 1:
                raise
    if case.words[0] != "features":
        return main(case.words)
    try:
        load(case.words[2], device="cpu").features(case.words[1])
    except DinoError as error:
        print(f"dinov2: {error}", file=sys.stderr)
        return 2
    return 0


def _forked(case: Case, watch: _Watch) -> dict[str, Any]:
    """The case in a child, which is ended with all its children when its time is over."""
    files = [Path(case.folder, name) for name in (".out", ".err", ".events")]
    out, err, watch.events = (os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for file in files)
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(case, (out, err), watch)
    ended = os.pidfd_open(child)
    select.select([ended], [], [], SECONDS)
    seconds = time.monotonic() - start
    with contextlib.suppress(ProcessLookupError):  # its loader workers as well
        os.killpg(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    for descriptor in (ended, out, err, watch.events):
        os.close(descriptor)
    texts = [file.read_bytes().decode("utf-8", "backslashreplace") for file in files]
    for file in files:
        file.unlink()
    return {
        "code": os.waitstatus_to_exitcode(status),
        "out": texts[0],
        "err": texts[1],
        "seconds": seconds,
        "memory": usage.ru_maxrss * 1024,
        "events": [json.loads(line) for line in texts[2].splitlines()],
    }


def _serve(modules: Sequence[str]) -> None:
    import importlib

    import torch

    torch.set_num_threads(1)
    for module in modules:
        importlib.import_module(module)
    atexit._clear()  # ends of libraries, which touch much memory; what a command registers is run in its child
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page
    watch = _Watch()
    sys.addaudithook(watch.hook)
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin.buffer:
        answer = json.dumps(_forked(Case(**json.loads(line)), watch)).encode() + b"\n"
        os.write(answers, answer)
    os._exit(0)  # what the libraries do at an end was taken away


if __name__ == "__main__":
    _serve(sys.argv[1:])
