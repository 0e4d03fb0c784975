"""`dinov2 neighbours`."""

import argparse

from dinov2.cli.common import ExtractionProgress, add_command, add_image_options, check_file_place, positive, say

__all__ = ["add_to"]

_MOST_LINES = 20


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "neighbours",
        _run,
        help="find nearest images and near-duplicates among features",
        description=(
            "Find the nearest images of a query, or near-duplicates, among the features that `dinov2 embed` wrote,\n"
            "and write a page with pictures."
        ),
        example="dinov2 neighbours features.parquet --query cat.jpg -o neighbours.html",
    )
    parser.add_argument("features", nargs="?", metavar="FEATURES", help="what dinov2 embed wrote: a file or a folder")
    parser.add_argument("--features", dest="named", metavar="FEATURES", help="the same, as in dinov2 eval")
    parser.add_argument(
        "--query", nargs="+", default=[], metavar="IMAGE", help="image files (default: a sample of the stored images)"
    )
    parser.add_argument("--model", "-m", metavar="M", help="model of the queries (default: that of the features)")
    parser.add_argument("--k", "-k", type=positive, default=10, metavar="K", help="neighbours of a query (default: 10)")
    parser.add_argument(
        "--duplicates", type=float, metavar="T", help="list pairs at least this similar, for example 0.95"
    )
    parser.add_argument("--column", default="cls", metavar="NAME", help="what is compared: cls, mean, layer11_cls, ...")
    parser.add_argument(
        "--samples", type=positive, default=12, metavar="N", help="stored images to query with (default: 12)"
    )
    parser.add_argument("--images", metavar="DIR", help="folder of the images, where they have moved")
    parser.add_argument("--output", "-o", metavar="PAGE", help="the page (default: FEATURES.neighbours.html)")
    add_image_options(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:<n> or mps (default: auto)")
    parser.add_argument("--json", metavar="FILE", help="also write everything that was found as JSON")


def _run(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from dinov2.apps.neighbours import neighbours
    from dinov2.whole_files import write_json

    features = arguments.features or arguments.named
    if features is None or None not in (arguments.features, arguments.named):
        arguments.parser.error("one file or folder of FEATURES is required, by itself or as --features FEATURES")
    check_file_place(arguments.json, task="neighbours")
    with ExtractionProgress() as progress:
        report = neighbours(
            features,
            queries=arguments.query,
            model=arguments.model,
            k=arguments.k,
            column=arguments.column,
            duplicates=arguments.duplicates,
            samples=arguments.samples,
            images=arguments.images,
            output=arguments.output,
            device=arguments.device,
            progress=progress,
        )
    for query, hits in report.neighbours.items():
        say(query)
        for hit in hits:
            say(f"  {hit.similarity:6.3f}  {hit.path}{f'  ({hit.label})' if hit.label is not None else ''}")
    if report.threshold is not None:
        say(f"{len(report.pairs):,} pairs are at least {report.threshold} similar, in {len(report.groups):,} groups")
        for a, b, similarity in report.pairs[:_MOST_LINES]:
            say(f"  {similarity:6.4f}  {a}  {b}")
        if len(report.pairs) > _MOST_LINES:
            say(f"  and {len(report.pairs) - _MOST_LINES:,} more; --json FILE has them all")
    if arguments.json:
        write_json(arguments.json, asdict(report))
    say(f"pictures are in {report.page}")
    return 0
