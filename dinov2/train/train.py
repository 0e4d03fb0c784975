"""The training loop of DINOv2: build, loop, finish (arXiv 2304.07193).

A run is a function of its configuration, its images and its seed: random numbers are drawn by step and sample number,
so that a resumed run equals the unbroken one bit for bit on a CPU with the same number of threads.
"""

import argparse
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinov2.checkpoints.files import save_teacher
from dinov2.checkpoints.runs import export_from_checkpoint
from dinov2.configs import Config, load_config, to_yaml
from dinov2.data.crops.collate import CropBatch
from dinov2.data.stream import SampleStream, hash_keys
from dinov2.distributed import get_global_rank, is_main_process
from dinov2.engine.memory import keep_freed_memory
from dinov2.engine.metrics import MetricsWriter, SkippedSteps, UnreadableImages, tensorboard_tracker
from dinov2.engine.optim import apply_hyper, guarded_step
from dinov2.engine.parallel import autocast
from dinov2.engine.progress import Progress
from dinov2.engine.run_folder import RunFolder
from dinov2.engine.signals import StopRequest
from dinov2.engine.threads import fastest_threads, one_thread_gain, sample_of
from dinov2.errors import ConfigError, DinoError
from dinov2.logging import setup_logging
from dinov2.models.config import BackboneConfig
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.train.monitoring import health_is_due, metrics_row, summary, training_health
from dinov2.train.setup import Training, batches, build_training, load_checkpoint, refuse_several_processes

__all__ = ["Evaluate", "Outcome", "config_from", "export_latest", "get_args_parser", "main", "train"]

_LOG = logging.getLogger("dinov2")

Evaluate = Callable[[Training, int], None]
"""Called with the training and the 0-based iteration whenever a teacher was exported."""


class Outcome(NamedTuple):
    """Result of a run."""

    step: int  # steps done in all
    total: int
    seconds: float  # of this process, evaluations included
    stopped_by: str | None  # a signal's name, or None
    unreadable: int
    skipped: int


def train(
    cfg: Config,
    output_dir: str | Path,
    *,
    max_steps: int | None = None,
    resume: bool = True,
    refuse_excess: bool = False,
    evaluate: Evaluate | None = None,
    announce: Callable[[str], None] = _LOG.info,
) -> Outcome:
    """Trains in `output_dir`, from its newest checkpoint if there is one.

    `max_steps` stops there and leaves the schedules alone. `refuse_excess` refuses a run of more memory or passes than
    anyone means (`dinov2.train.limits`), of which it otherwise warns. SIGTERM and SIGINT save a checkpoint and end the
    run cleanly. Raises `ConfigError` or `DataError` before anything is written, also when another process trains in
    `output_dir`, and `TrainingDiverged` when losses stay non-finite.
    """
    refuse_several_processes()
    run = RunFolder(output_dir, keep_checkpoints=cfg.train.keep_checkpoints)
    with run.exclusive():
        training = build_training(cfg, run, max_steps=max_steps, resume=resume, refuse_excess=refuse_excess)
        return _train(training, evaluate, announce)


def _train(training: Training, evaluate: Evaluate | None, announce: Callable[[str], None]) -> Outcome:
    began, run = time.monotonic(), training.run
    if training.first >= training.last:
        missing = run.teacher_file(training.last - 1)
        if training.first == training.last and not missing.exists():  # a run that ended while it was written
            load_checkpoint(training)
            _export_teacher(training, missing)
        asked = f"{training.last:,} were asked for" if training.last < training.total else "that is all"
        announce(f"{run.path} has done {training.first:,} of {training.total:,} steps, {asked}: nothing is left to do")
        return Outcome(training.first, training.total, 0.0, None, len(run.read_unreadable()), 0)
    if is_main_process():
        run.open(training.cfg)
    setup_logging(run.path)
    load_checkpoint(training)
    announce(summary(training))
    work = _forward_pass(training)
    threads = fastest_threads(work, device=training.device, threads=_threads(training))
    with StopRequest() as stop, threads, keep_freed_memory(training.device):
        step, unreadable, skipped = _loop(training, stop, evaluate)
    return Outcome(step, training.total, time.monotonic() - began, stop.reason, unreadable, skipped)


def _threads(training: Training) -> int:
    """Threads to take, 0 to measure: those of the configuration, else those that a resumed run has computed with.

    Sums over another number of threads are rounded otherwise, and the run would no longer equal the unbroken one.
    """
    facts = training.run.checkpoints.read_meta(training.first) if training.first else {}
    recorded = facts.get("threads")
    return training.cfg.train.num_threads or (recorded if isinstance(recorded, int) and recorded > 0 else 0)


def _forward_pass(training: Training) -> Callable[[], object]:
    """A forward pass of the teacher, which draws no random number and changes nothing, to time threads with."""
    cfg, teacher = training.cfg, training.objective.teacher["backbone"]
    images = sample_of(
        teacher,
        channels=cfg.student.in_chans,
        side=cfg.crops.global_crops_size,
        patch_size=cfg.student.patch_size,
        most=2 * cfg.train.batch_size_per_gpu,
    )

    def forward() -> object:
        with torch.no_grad(), autocast(training.device, training.precision):
            return teacher(images)

    return forward


def export_latest(cfg: Config, output_dir: str | Path) -> Path:
    """Writes the teacher of the run's newest checkpoint to `eval/manual_<steps>/` and returns the file.

    Raises `ConfigError` when the folder holds no checkpoint.
    """
    run = RunFolder(output_dir)
    step = run.checkpoints.latest()
    if step is None:
        raise ConfigError(f"{run.path} holds no checkpoint to export a teacher from; train first")
    return export_from_checkpoint(run.path, step, cfg)


def _loop(training: Training, stop: StopRequest, evaluate: Evaluate | None) -> tuple[int, int, int]:
    cfg, objective, optimizer = training.cfg, training.objective, training.optimizer
    trained = objective.trained_parts()
    skipped, unreadable = _skipped_steps(training), UnreadableImages(training.run)
    metrics, source = _Metrics(training), batches(training)
    timed_batches = _TimedIterator(source)
    step = training.first
    # Closing the source ends the loader's workers, also when the loop is left by an error.
    progress = Progress(
        training.last,
        training.first,
        device=training.device,
        one_thread_gain=lambda: one_thread_gain(_forward_pass(training), training.device),
    )
    with closing(source), progress, metrics:
        for step, batch in zip(range(training.first, training.last), timed_batches, strict=False):
            hyper = training.schedules.at(step)
            apply_hyper(optimizer, hyper)
            _seed_step(cfg.train.seed, step)
            losses = objective(batch, hyper)
            (losses.total if training.scaler is None else training.scaler.scaled(losses.total)).backward()
            outcome = guarded_step(optimizer, trained, cfg.optim.clip_grad, loss=losses.total, scaler=training.scaler)
            optimizer.zero_grad(set_to_none=True)
            objective.update_teacher(hyper.momentum, finite=outcome.finite)
            skipped.note(step, outcome.finite, losses.named(), batch.sample_numbers)
            unreadable.note(batch.failures)
            progress.step(images=training.global_batch, waiting=timed_batches.seconds)

            done = step + 1
            if step % cfg.train.log_every == 0 or done == training.last:
                skipped.check()
                row = metrics_row(training, step, losses, hyper, outcome, progress.figures())
                if health_is_due(cfg, step, total=training.total):
                    with progress.paused():
                        row |= training_health(training, batch, hyper)
                metrics.write(row)
                progress.show(loss=row["loss"])
            try:
                if _due(done, cfg.evaluation.eval_period_iterations) or done == training.last:
                    with progress.paused():
                        _export_and_evaluate(training, step, evaluate)
            finally:
                # Whatever became of the evaluation, the steps done are not lost; a signal may have come meanwhile.
                ending = done == training.last or bool(stop)
                if _due(done, cfg.train.checkpoint_every or 3 * cfg.train.OFFICIAL_EPOCH_LENGTH) or ending:
                    skipped.check()
                    unreadable.write()
                    _save(training, done, skipped)
            if ending:
                if not training.run.teacher_file(step).exists():  # stopped on request: what was learned can be used
                    _export_teacher(training, training.run.teacher_file(step))
                break
    return step + 1, len(unreadable.reasons), skipped.count


def _export_and_evaluate(training: Training, step: int, evaluate: Evaluate | None) -> None:
    _export_teacher(training, training.run.teacher_file(step))
    if evaluate is not None:
        evaluate(training, step)
        training.objective.train()


def _export_teacher(training: Training, file: Path) -> None:
    """Write the teacher in the release's layout, and its backbone as safetensors beside it."""
    if not is_main_process():
        return
    backbone = training.objective.teacher["backbone"]
    assert isinstance(backbone, DinoVisionTransformer)
    config = BackboneConfig.from_model(backbone, mean=training.cfg.crops.mean, std=training.cfg.crops.std)
    save_teacher(file, training.objective.teacher.state_dict(), config)


def _skipped_steps(training: Training) -> SkippedSteps:
    stream = SampleStream(len(training.dataset), training.cfg.train.seed)

    def images_of(sample_numbers: Tensor) -> list[str]:
        return [training.dataset.path_of(index) for index in stream.index_of(sample_numbers.numpy()).tolist()]

    most = training.cfg.train.max_skipped_steps
    return SkippedSteps(training.run, first=training.first, most_in_a_row=most, images_of=images_of)


def _due(done: int, period: int) -> bool:
    return period > 0 and done % period == 0


def _seed_step(seed: int, step: int) -> None:
    """Stochastic depth draws from PyTorch's global generator; its seed belongs to step and process, not to history."""
    torch.manual_seed(int(hash_keys(seed, step, get_global_rank(), "step") >> 1))


def _save(training: Training, done: int, skipped: SkippedSteps) -> None:
    facts = {
        "config": to_yaml(training.cfg),
        "fingerprint": training.fingerprint,
        "global_batch": training.global_batch,
        "skipped_in_a_row": skipped.in_a_row,
        "threads": torch.get_num_threads(),
    }
    training.run.checkpoints.save(done, training.state(), meta=facts)


class _TimedIterator:
    """Iterator over batches; `seconds` is the time that the last one took to arrive."""

    def __init__(self, source: Iterator[CropBatch]) -> None:
        self._source = source
        self.seconds = math.nan

    def __iter__(self) -> "_TimedIterator":
        return self

    def __next__(self) -> CropBatch:
        began = time.perf_counter()
        batch = next(self._source)
        self.seconds = time.perf_counter() - began
        return batch


class _Metrics:
    """`training_metrics.json` and TensorBoard, on the main process; cut back to the step that the run resumes from."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._writers: list[Any] = []

    def __enter__(self) -> "_Metrics":
        if is_main_process():
            writer = MetricsWriter(self._training.run.metrics)
            first = self._training.first
            # A call with `max_steps` wrote down its last step, for whoever looks; the unbroken run has no such row.
            if (first - 1) % self._training.cfg.train.log_every:
                first -= 1
            writer.cut_back(first)
            tracker = tensorboard_tracker(self._training.run.path, first_iteration=first)
            self._writers = [writer] + ([tracker] if tracker is not None else [])
        return self

    def write(self, row: dict[str, Any]) -> None:
        for writer in self._writers:
            writer.write(row)

    def __exit__(self, *exception: object) -> None:
        for writer in self._writers:
            writer.close()


def get_args_parser(add_help: bool = True, parents: Sequence[argparse.ArgumentParser] = ()) -> argparse.ArgumentParser:
    """The release's parser: `--config-file F [--no-resume] [--eval-only] --output-dir OUT key=value ...`."""
    parser = argparse.ArgumentParser("DINOv2 training", add_help=add_help, parents=list(parents))
    parser.add_argument("--config-file", default="", metavar="FILE", help="YAML file, or a packaged name")
    parser.add_argument("--no-resume", action="store_true", help="refuse a folder that already holds a run")
    parser.add_argument("--eval-only", action="store_true", help="export the teacher of the newest checkpoint and exit")
    parser.add_argument("--eval", default="", help="accepted without effect, as in the release")
    parser.add_argument(
        "--output-dir", "--output_dir", default="", help="folder of the run (default: a new one in runs/)"
    )
    parser.add_argument("opts", nargs="*", default=[], metavar="key=value", help="configuration keys")
    return parser


def config_from(arguments: argparse.Namespace) -> Config:
    """The configuration of parsed arguments; raises `ConfigError` in one sentence."""
    return load_config(arguments.config_file or None, arguments.opts)


def main(args: argparse.Namespace) -> None:
    """Trains from arguments of `get_args_parser`, without evaluation on the way, as the release's function does."""
    cfg = config_from(args)
    output_dir = args.output_dir or cfg.train.output_dir
    if args.eval_only:
        export_latest(cfg, output_dir)
    else:
        train(cfg, output_dir, resume=not args.no_resume)


if __name__ == "__main__":  # as the release's users start it under torchrun
    try:
        main(get_args_parser().parse_intermixed_args())
    except DinoError as error:
        sys.stderr.write(f"dinov2: {error}\n")
        sys.exit(2 if isinstance(error, ValueError) else 1)
