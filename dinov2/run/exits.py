"""Exit codes of commands: errors of this package become one sentence on standard error.

0 done, 1 failed on the way, 2 wrong input, 130 interrupted. Only what nobody foresaw shows a traceback.
"""

import atexit
import io
import multiprocessing.util  # registers the waiting for children, which `_end_workers` has to precede
import os
import signal
import sys
from collections.abc import Callable

from dinov2.errors import ConfigError, DataError, DinoError, MissingDependency, WeightsError

__all__ = ["escape_streams", "exit_code_of"]

_BAD_INPUT = (ConfigError, DataError, WeightsError, MissingDependency)


def escape_streams() -> None:
    """Has standard output and error escape what their encoding cannot show (`\\u72ac`), instead of failing on it.

    Consoles and pipes are not UTF-8 everywhere, and file names need not be text at all.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def exit_code_of(command: Callable[[], int]) -> int:
    """Runs a command and returns its exit code."""
    atexit.unregister(_end_workers)  # once is enough
    atexit.register(_end_workers)
    try:
        code = command()
        print(end="", flush=True)  # a reader that is gone is noticed here and not while Python shuts down
        return code
    except DinoError as error:
        print(f"dinov2: {error}", file=sys.stderr)
        return 2 if isinstance(error, _BAD_INPUT) else 1
    except KeyboardInterrupt:
        print("dinov2: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output is gone; a second complaint at exit would only add noise.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"dinov2: {where}{error.strerror or error}", file=sys.stderr)
        return 1


def _end_workers() -> None:
    """Ends loader workers that an error or an interrupt left behind.

    They leave the first SIGTERM to this process, which is the one that Python sends before it waits for them: without
    this, a training that failed would never end.
    """
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would complain of the deaths
    for worker in workers:
        worker.kill()
