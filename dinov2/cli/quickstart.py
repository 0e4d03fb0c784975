"""`dinov2 quickstart`."""

import argparse

from dinov2.cli.common import add_command, positive, say

__all__ = ["add_to"]


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "quickstart",
        _run,
        help="train a tiny model on built-in pictures and show what it learned, in a few minutes",
        example="dinov2 quickstart",
    )
    parser.add_argument(
        "--output-dir",
        default="runs/quickstart",
        metavar="OUT",
        help="where the run is written (default: runs/quickstart)",
    )
    parser.add_argument("--max-steps", type=positive, metavar="N", help="stop after step N, to try it in less time")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys")


def _run(arguments: argparse.Namespace) -> int:
    from dinov2.apps.places import output_folder
    from dinov2.apps.quickstart import quickstart
    from dinov2.logging import setup_logging

    folder = output_folder(arguments.output_dir, task="quickstart")
    setup_logging()
    summary = quickstart(output_dir=folder, max_steps=arguments.max_steps, overrides=arguments.overrides, say=say)
    say("")
    say("k-NN accuracy on pictures that training has not seen:")
    for key, label in (("raw_pixels", "raw pixels"), ("untrained", "untrained model"), ("trained", "trained model")):
        say(f"  {label:16} {summary[key]:5.1f} %")
    say(f"in {summary['seconds']:.0f} seconds; pictures and curves: {folder / 'report.html'}")
    say("next, with images of your own: dinov2 train --data DIR --output-dir runs/mine --preset cifar10")
    return 0
