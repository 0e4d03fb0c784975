"""`dinov2 train`."""

import argparse
import os
import shlex

from dinov2.cli.common import add_command, add_image_options, positive, say
from dinov2.errors import ConfigError

__all__ = ["add_to"]


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "train",
        _run,
        help="train a model on images without labels",
        description=(
            "Train a model on images without labels. Starting the same command again resumes from the newest\n"
            "checkpoint of the output folder. Ctrl-C saves a checkpoint and stops."
        ),
        example="dinov2 train --data photos --output-dir runs/photos --preset cifar10 optim.epochs=30",
    )
    parser.add_argument(
        "--data", metavar="DIR", help="folder of images, or a data set such as list:FILE, toy:split=TRAIN"
    )
    parser.add_argument(
        "--output-dir",
        "--output_dir",
        metavar="OUT",
        help="where the run is written (default: a new runs/<date>-train)",
    )
    parser.add_argument("--preset", metavar="NAME", help="a recipe for small machines; --list-presets shows them")
    parser.add_argument("--list-presets", action="store_true", help="show the presets and exit")
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help="YAML file in the release's keys, or a packaged name such as train/vitl16_short",
    )
    parser.add_argument(
        "--max-steps", type=positive, metavar="N", help="stop after step N; schedules stay those of the whole run"
    )
    parser.add_argument(
        "--no-resume", action="store_true", help="refuse a folder that already holds a run instead of resuming it"
    )
    parser.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="threads on the CPU, as train.num_threads (default: one or all, whichever is faster at the start)",
    )
    parser.add_argument(
        "--yes",
        action="store_true",
        help="start a new run also where it needs more than 70 %% of the free memory, or more than 1,000 passes over "
        "the images without --max-steps",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the configuration, write nothing"
    )
    add_image_options(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="configuration keys, such as train.batch_size_per_gpu=32"
    )


def _run(arguments: argparse.Namespace) -> int:
    from dinov2.configs import list_presets

    if arguments.list_presets:
        for preset in list_presets():
            say(f"{preset.name:10} {preset.summary}")
        return 0
    from dinov2.apps.train import check_training, outcome_line, run_training, training_config
    from dinov2.logging import setup_logging

    _refuse_bare_paths(arguments.overrides)
    cfg = training_config(
        data=arguments.data,
        preset=arguments.preset,
        config_file=arguments.config_file,
        overrides=[*arguments.overrides, *([f"train.num_threads={arguments.threads}"] if arguments.threads else [])],
    )
    if arguments.dry_run:
        say(check_training(cfg, output_dir=arguments.output_dir, resume=not arguments.no_resume))
        return 0
    setup_logging()
    folder, outcome = run_training(
        cfg,
        output_dir=arguments.output_dir,
        max_steps=arguments.max_steps,
        resume=not arguments.no_resume,
        refuse_excess=not arguments.yes,
        announce=say,
    )
    say(outcome_line(outcome, folder))
    say(f"results are in {folder}")
    if not outcome.stopped_by:
        run = shlex.quote(str(folder))
        say(f"next: dinov2 eval knn --model {run} --train-dataset DIR --val-dataset DIR, or dinov2 report {run}")
    return 0


def _refuse_bare_paths(words: list[str]) -> None:
    for word in words:
        if "=" not in word and os.path.exists(os.path.expanduser(word)):
            raise ConfigError(
                f"{word!r} is a path and not a key=value; to train on the images there, write --data {word}"
            )
