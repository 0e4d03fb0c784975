"""What an evaluation would do: images, classes, what is kept already, and how long the model takes for the rest."""

import time
from collections.abc import Sequence

import torch

from dinov2.apps.evaluation.datasets import NamedSet
from dinov2.apps.evaluation.session import Inputs, session
from dinov2.apps.evaluation.subjects import Subject, subject_of

__all__ = ["evaluation_plan"]

_SYNTHETIC = 64


def evaluation_plan(inputs: Inputs, *, task: str, parts: Sequence[str] | None = ("cls",)) -> list[str]:
    """Lines that say what `task`, which reads those parts (None: all), would do; nothing is written.

    The model sees synthetic images only.

    Raises what the evaluation itself would raise before its work.
    """
    lines: list[str] = []
    with session(inputs, task=task) as opened:
        subject = subject_of(opened.loaded)
        speed = _images_a_second(subject, inputs.batch_size)
        lines.append(
            f"{subject.name}: {sum(subject.parts.values())} columns ({', '.join(subject.parts)}) in "
            f"{subject.precision} on {subject.device}, {speed:,.1f} synthetic images of "
            f"{subject.transform.crop_size} pixels a second"
        )
        different = dict.fromkeys((opened.sets.train, opened.sets.val))
        waiting = 0
        for named in different:
            kept = opened.bank.is_kept(subject, named, parts=parts or list(subject.parts))
            waiting += 0 if kept else len(named.images)
            lines.append(_described(named, kept=kept))
        if waiting:
            lines.append(f"the model needs about {_duration(waiting / speed)} for {waiting:,} images, decoding apart")
        lines.append(f"results would be in {opened.folder}; nothing was written")
    return lines


def _described(named: NamedSet, *, kept: bool) -> str:
    targets = named.images.get_targets()
    assert targets is not None
    labels = torch.as_tensor(targets)
    n_classes = len(labels[labels >= 0].unique())
    state = "features are in the cache" if kept else "features have to be extracted"
    return f"{named.name}: {len(named.images):,} images of {n_classes:,} classes, {state}"


def _images_a_second(subject: Subject, batch_size: int) -> float:
    size = subject.transform.crop_size
    images = torch.randn(min(_SYNTHETIC, batch_size), subject.channels, size, size, device=subject.device)
    rounds = -(-_SYNTHETIC // len(images))
    subject.columns(images)  # the first pass prepares
    started = time.perf_counter()
    for _ in range(rounds):
        subject.columns(images).cpu()  # waits for the device
    return rounds * len(images) / (time.perf_counter() - started)


def _duration(seconds: float) -> str:
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
