"""The loop of the linear probe: batches in, trained heads out, with checkpoints that continue bit for bit.

Where batches come from is the caller's: rows of cached features, or a loader that augments and encodes images anew for
every step, as the papers do. Both are asked for the batches from a given iteration on, so a run that was stopped sees
what it would have seen.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from dinov2 import distributed
from dinov2.data.stream import SampleStream
from dinov2.engine.checkpoint import CheckpointStore
from dinov2.errors import ConfigError, DataError
from dinov2.eval.linear.heads import LinearHeads

__all__ = ["Batches", "cached_batches", "cosine_decay", "train_heads"]

Batches = Callable[[int], Iterable[tuple[Tensor, Tensor]]]
"""first iteration -> this process's (rows [B, W], classes int64 [B]) of it and all after it."""


def cached_batches(rows: Tensor, classes: Tensor, *, batch_size: int, seed: int = 0) -> Batches:
    """Batches of cached features [S, W]: every row once an epoch, in an order that depends on the seed alone.

    The order is that of `batch_size` images of all processes together, of which each takes its part, so that the
    number of processes changes nothing.
    """
    stream = SampleStream(len(rows), seed)
    rank, world_size = distributed.get_global_rank(), distributed.get_global_size()
    own = slice(batch_size * rank // world_size, batch_size * (rank + 1) // world_size)

    def batches(first: int) -> Iterable[tuple[Tensor, Tensor]]:
        iteration = first
        while True:
            numbers = np.arange(iteration * batch_size, (iteration + 1) * batch_size)[own]
            chosen = torch.from_numpy(stream.index_of(numbers))
            yield rows[chosen], classes[chosen]
            iteration += 1

    return batches


def train_heads(
    heads: LinearHeads,
    batches: Batches,
    *,
    n_iterations: int,
    momentum: float = 0.9,
    checkpoints: CheckpointStore | None = None,
    save_every: int = 1250,
    identity: Mapping[str, object] | None = None,
    after: Callable[[int, Tensor], None] | None = None,
    until: int | None = None,
) -> int:
    """Train in place and return the iteration that it began at (above 0 when it continued from a checkpoint).

    Args:
        checkpoints: where to save every `save_every` iterations and at the end, and to continue from.
        identity: plain values that a checkpoint must have been made with (model, data, settings).
        after: called with the number of iterations done and the losses [heads] of the last one.
        until: stop there, as if interrupted, with a checkpoint.

    A finished run is loaded and not trained further.

    Raises:
        ConfigError: the checkpoint belongs to another grid, data set or model.
        DataError: the batches end early.
    """
    identity = {**(identity or {}), "grid": _describe_grid(heads), "n_iterations": n_iterations, "momentum": momentum}
    first = _resume(heads, checkpoints, identity)
    last = n_iterations if until is None else min(until, n_iterations)
    if first >= last:
        return first
    done = first
    for batch, classes in batches(first):
        losses = heads.step(
            heads.columns.check(batch), classes, decay=cosine_decay(done, n_iterations), momentum=momentum
        )
        done += 1
        if after is not None:
            after(done, losses)
        if checkpoints is not None and (done % save_every == 0 or done == last):
            checkpoints.save(done, {"heads": heads.state_dict()}, meta={"identity": identity})
        if done == last:
            return first
    raise DataError(
        f"the batches ended after {done - first} of {last - first} iterations; give a loader that goes on without end"
    )


def _resume(heads: LinearHeads, checkpoints: CheckpointStore | None, identity: dict[str, object]) -> int:
    step = None if checkpoints is None else checkpoints.latest()
    if checkpoints is None or step is None:
        return 0
    saved = checkpoints.read_meta(step).get("identity", {})
    differing = [key for key in {**identity, **saved} if identity.get(key) != saved.get(key)]
    if differing:
        raise ConfigError(
            f"{checkpoints.folder} holds a linear probe that differs in {', '.join(sorted(differing))}; give another "
            "output folder, or start afresh without resuming"
        )
    checkpoints.load(step, into={"heads": heads.state_dict()})
    return step


def _describe_grid(heads: LinearHeads) -> dict[str, object]:
    columns = heads.columns
    return {
        "heads": [[head.n_blocks, head.avgpool, head.rate] for head in heads.table],
        "features": [columns.embed_dim, columns.n_blocks, columns.pooled],
        "n_classes": heads.n_classes,
    }


def cosine_decay(iteration: int, n_iterations: int) -> float:
    """The share of its rate that a head trains with: from 1 to 0 along a half cosine."""
    return 0.5 * (1 + math.cos(math.pi * iteration / n_iterations))
