"""Self-supervised training: the method (`ssl_meta_arch`) and the loop (`train`)."""

import argparse

from dinov2.train.arguments import config_from, get_args_parser
from dinov2.train.ssl_meta_arch import SSLMetaArch

__all__ = ["SSLMetaArch", "get_args_parser", "main"]


def main(args: argparse.Namespace) -> None:
    """Trains from arguments of `get_args_parser`, without evaluation on the way, as the release's function does."""
    from dinov2.train.train import export_latest, train

    cfg = config_from(args)
    output_dir = args.output_dir or cfg.train.output_dir
    if args.eval_only:
        export_latest(cfg, output_dir)
    else:
        train(cfg, output_dir, resume=not args.no_resume)
