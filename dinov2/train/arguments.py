"""The flags of the release's training command, and the configuration that they make."""

import argparse
from collections.abc import Sequence

from dinov2.configs import Config, load_config

__all__ = ["config_from", "get_args_parser"]


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
