"""Common parts of the release's evaluation commands: flags, and the transform of evaluation images."""

import argparse
from collections.abc import Sequence
from typing import Any

from dinov2.data.eval_transform import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, EvalTransform

__all__ = ["eval_transform_for", "evaluation_parser", "get_args_parser"]


def eval_transform_for(cfg: Any) -> EvalTransform:
    """The transform of a training config: its global crop size and normalisation, `evaluation.resize_size`."""
    return EvalTransform(
        crop_size=cfg.crops.global_crops_size,
        resize_size=getattr(cfg.evaluation, "resize_size", 0),
        mean=getattr(cfg.crops, "mean", IMAGENET_DEFAULT_MEAN),
        std=getattr(cfg.crops, "std", IMAGENET_DEFAULT_STD),
    )


def get_args_parser(
    description: str | None = None,
    parents: Sequence[argparse.ArgumentParser] | None = None,
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """The flags that all evaluation commands of the release share."""
    parser = argparse.ArgumentParser(description=description, parents=list(parents or ()), add_help=add_help)
    parser.add_argument("--config-file", type=str, help="YAML file of the model")
    parser.add_argument("--pretrained-weights", type=str, help="weight file or a run's folder")
    parser.add_argument("--output-dir", default="", type=str, help="where results are written")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY=VALUE", help="config overrides")
    return parser


def evaluation_parser(
    description: str | None,
    parents: Sequence[argparse.ArgumentParser] | None,
    add_help: bool,
    *,
    train: str,
    val: str,
) -> argparse.ArgumentParser:
    """Base parser of these commands; `train` and `val` name the purpose of the images."""
    parser = argparse.ArgumentParser(
        description=description, parents=[*(parents or ()), get_args_parser(add_help=False)], add_help=add_help
    )
    parser.add_argument("--train-dataset", default="ImageNet:split=TRAIN", help=f"labelled images {train}")
    parser.add_argument("--val-dataset", default="ImageNet:split=VAL", help=f"labelled images {val}")
    return parser
