"""State of a run: going on, or how it ended. Read from its files alone."""

from dinov2.apps.doctor.findings import Finding, fine, note, problem
from dinov2.apps.doctor.run_log import RunLog
from dinov2.apps.doctor.signs import Signs

__all__ = ["examine_state"]

# A silence this many times as long as the usual one, and at least so many seconds, means that no process writes.
_PATIENCE = 10
_LEAST_PATIENCE = 120.0


def examine_state(log: RunLog, signs: Signs) -> tuple[str, Finding]:
    """The run's state in a word, and what it means.

    One of `finished`, `gave up`, `paused`, `running`, `silent`, `stopped`, `killed`; docs/doctor.md explains them.
    Without times of its files (`silent_for` None) an unfinished run is never called running.
    """
    done, of_all = f"{signs.done:,}", f" of {signs.total:,}" if signs.total else ""
    saved = max(log.checkpoints, default=0)
    facts = {"done": signs.done, "total": signs.total, "checkpoint": saved, "silent_for": log.silent_for}
    if signs.total is not None and signs.done >= signs.total:
        return "finished", fine("state", f"finished: {done}{of_all} steps", **facts)
    if _gave_up(log):
        says = f"gave up after {done}{of_all} steps, because steps in a row were not finite"
        return "gave up", problem(
            "state", says, "look at skipped_steps.json; start anew with what is said below", **facts
        )
    if log.process is not None and log.paused:
        says = f"process {log.process} was paused after {done}{of_all} steps, {_words(log.silent_for)} ago"
        return "paused", note("state", says, f"kill -CONT {log.process}", **facts, process=log.process)
    ended = log.locked is False  # an open log may belong to a session that has trained and goes on with other work
    if not ended and log.silent_for is not None and log.silent_for < _patience(log):
        return "running", fine("state", f"running: {done}{of_all} steps done", **facts)
    again = f"the same command goes on from step {saved:,}" if saved else "the same command begins anew"
    if not ended and log.process is not None:
        return "silent", note(
            "state",
            f"process {log.process} is there but has written nothing for {_words(log.silent_for)}: it hangs, or is in "
            "a long evaluation",
            f"if it stays silent, end process {log.process}; {again}",
            **facts,
            process=log.process,
        )
    if saved > log.last_iteration() and saved:
        says = f"stopped after {done}{of_all} steps; a checkpoint holds all of them"
        return "stopped", note("state", says, again, **facts)
    if not log.rows and not saved:
        says = "ended before a single step was logged"
        return "killed", problem("state", says, "start it again; what it said last is in logs/log.txt", **facts)
    lost = log.last_iteration() + 1 - saved
    silence = f", silent for {_words(log.silent_for)}" if log.silent_for is not None else ""
    where = f"its newest checkpoint is of step {saved:,}" if saved else "it has no checkpoint"
    return "killed", problem(
        "state",
        f"ended in the middle after {done}{of_all} steps{silence}: killed, or out of memory, or a power cut; {where}",
        f"{again} and repeats {lost:,} steps; a smaller train.checkpoint_every loses less",
        **facts,
    )


def _patience(log: RunLog) -> float:
    """Seconds of silence that are normal for this run."""
    every = log.cfg.train.log_every if log.cfg is not None else 10
    times = [value for _, value in log.series("iter_time")[-3:]]
    return max(_LEAST_PATIENCE, _PATIENCE * every * max(times, default=0.0))


def _gave_up(log: RunLog) -> bool:
    """Whether the last steps were skipped, as many in a row as end a run."""
    limit = log.cfg.train.max_skipped_steps if log.cfg is not None else 5
    tail = log.skipped[-limit:]
    in_a_row = len(tail) == limit and tail[-1] - tail[0] == limit - 1
    return in_a_row and tail[-1] >= log.last_iteration()


def _words(seconds: float | None) -> str:
    if seconds is None:
        return "an unknown time"
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} seconds"
