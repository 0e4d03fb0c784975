"""`dinov2 train`."""

import argparse

from dinov2.cli.common import add_command, positive, say

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
        "--dry-run", action="store_true", help="check everything, print the configuration, write nothing"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="configuration keys, such as train.batch_size_per_gpu=32"
    )


def _run(arguments: argparse.Namespace) -> int:
    from dinov2.configs import list_presets

    if arguments.list_presets:
        for preset in list_presets():
            say(f"{preset.name:10} {preset.summary}")
        return 0
    from dinov2.apps.train import check_training, run_training, training_config
    from dinov2.logging import setup_logging

    cfg = training_config(
        data=arguments.data,
        preset=arguments.preset,
        config_file=arguments.config_file,
        overrides=arguments.overrides,
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
        announce=say,
    )
    notes = [f"{outcome.step:,} of {outcome.total:,} steps done"]
    if outcome.stopped_by:
        notes.append(f"stopped by {outcome.stopped_by}, a checkpoint is saved: the same command goes on")
    if outcome.unreadable:
        notes.append(f"{outcome.unreadable} images could not be read, see unreadable_images.json")
    if outcome.skipped:
        notes.append(f"{outcome.skipped} steps skipped, see skipped_steps.json")
    say("; ".join(notes))
    say(f"results are in {folder}")
    say(f"next: dinov2 eval knn --model {folder} --train-dataset DIR --val-dataset DIR, or dinov2 report {folder}")
    return 0
