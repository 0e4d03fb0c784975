"""`dinov2 viz`."""

import argparse

from dinov2.cli.common import (
    ExtractionProgress,
    add_command,
    add_compute_options,
    add_image_options,
    add_max_tokens,
    add_stride,
    positive,
    say,
)

__all__ = ["add_to"]

_MAPS = ("pca", "attention", "similarity", "norm", "matches")


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "viz",
        _run,
        help="draw what a model sees in images: PCA, attention, similarity, norms, matches",
        description=(
            "Draw what a model sees in images, as PNG files and as one HTML page (OUT/index.html) on which a click\n"
            "on a patch shows what is similar to it, in all images. The page opens offline and is at most 16 MB."
        ),
        example=(
            "dinov2 viz cat.jpg dog.jpg --model dinov2_vits14_reg -o maps\n"
            "  dinov2 viz frames/ --model runs/photos --what pca --gif -o maps --basis colours.safetensors"
        ),
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="files, folders, patterns, files of several frames (GIF, WebP, TIFF); all share one PCA basis",
    )
    parser.add_argument(
        "--model",
        "-m",
        required=True,
        metavar="M",
        help="a release, a weight file, a run's folder, a Hugging Face folder or id, timm:NAME, module:function, ...",
    )
    parser.add_argument(
        "--output-dir", "--output", "-o", metavar="OUT", help="where pictures go (default: a new runs/<date>-viz)"
    )
    parser.add_argument(
        "--what", nargs="+", choices=_MAPS, default=[], metavar="MAP", help=f"some of {', '.join(_MAPS)} (default: all)"
    )
    parser.add_argument(
        "--size", type=positive, metavar="PIXELS", help="length of the shorter side (default: 32 patches)"
    )
    parser.add_argument(
        "--block",
        type=int,
        default=-1,
        metavar="N",
        help="block whose features and attention are shown, from 0, or -1 for the last (default: -1)",
    )
    parser.add_argument(
        "--point",
        nargs=2,
        type=float,
        metavar=("X", "Y"),
        help="pixel of the first image whose patch similarities are measured to (default: its centre)",
    )
    parser.add_argument(
        "--basis",
        metavar="FILE",
        help="PCA basis: reused when the file exists, so that colours stay the same, else written there "
        "(default: OUT/basis.safetensors, written)",
    )
    parser.add_argument(
        "--foreground", action="store_true", help="fit the PCA colours on the foreground and fade the background"
    )
    parser.add_argument("--compare", metavar="M", help="another model, to be drawn beside the first one")
    parser.add_argument(
        "--gif", action="store_true", help="one moving picture of all images for each map, instead of a file an image"
    )
    parser.add_argument("--no-page", action="store_true", help="write no HTML page")
    parser.add_argument(
        "--norm-threshold",
        type=float,
        metavar="N",
        help="norm above which a patch counts as high (default: twice the median of all patches)",
    )
    add_max_tokens(parser, default=4096)
    add_stride(parser)
    add_image_options(parser)
    add_compute_options(parser)


def _run(arguments: argparse.Namespace) -> int:
    from dinov2.apps.viz import viz

    with ExtractionProgress() as progress:
        report = viz(
            arguments.images,
            model=arguments.model,
            output=arguments.output_dir,
            what=arguments.what,
            size=arguments.size,
            block=arguments.block,
            point=arguments.point,
            basis=arguments.basis,
            foreground=arguments.foreground,
            compare=arguments.compare,
            gif=arguments.gif,
            page=not arguments.no_page,
            norm_threshold=arguments.norm_threshold,
            max_tokens=arguments.max_tokens,
            stride=arguments.stride,
            device=arguments.device,
            precision=arguments.precision,
            progress=progress,
        )
    for note in report.notes:
        say(f"note: {note}")
    for name, share, threshold in zip(report.model_names, report.high_norm_shares, report.norm_thresholds, strict=True):
        say(f"{name}: {100 * share:.2f} % of the patches have a norm above {threshold:.4g}")
    say(f"PCA basis {'reused from' if report.basis_reused else 'written to'} {report.basis}")
    say(f"{len(report.files)} pictures and viz.json are in {report.output_dir}")
    if report.page is not None:
        say(f"to click on: {report.page.path} ({report.page.n_bytes / 1e6:.1f} MB, opens offline)")
    return 0
