"""`dinov2 convert`."""

import argparse

from dinov2.cli.common import ExtractionProgress, add_command, check_file_place, positive, say

__all__ = ["add_to"]


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "convert",
        _run,
        help="write a model in the layout of another library, verified",
        example="dinov2 convert dinov2_vits14_reg exported/vits14-reg --to hf",
        description="Write a model in the release's, Hugging Face's or timm's layout. The result is read back and "
        "compared with the source before it is put in place.",
    )
    parser.add_argument("source", metavar="IN", help="a release, weight file, run, or folder of Hugging Face or timm")
    parser.add_argument("out", metavar="OUT", help="a file (.pth, .safetensors) for original and timm, else a folder")
    parser.add_argument("--to", required=True, choices=["original", "hf", "timm"], help="the layout to write")
    parser.add_argument("--head", metavar="FILE", help="a linear classifier to put on top: a file with weight and bias")
    parser.add_argument("--layers", type=int, choices=[1, 4], help="which released head a name like *_lc stands for")
    parser.add_argument("--labels", metavar="FILE", help="names of the classes, one a line (1,000: ImageNet's)")
    parser.add_argument("--without-head", action="store_true", help="leave the source's classifier out")
    parser.add_argument(
        "--img-size",
        type=positive,
        nargs="+",
        metavar="N",
        help="adapt the position grid to images of this side, or of this height and width (the native ones, for a file "
        "with positions that are no square and do not tell them)",
    )
    parser.add_argument("--patch-size", type=positive, metavar="N", help="adapt the patch kernels to this size")
    parser.add_argument("--in-chans", type=positive, metavar="N", help="adapt the patch kernels to this many channels")
    parser.add_argument("--skip-library", action="store_true", help="do not compare with transformers or timm itself")
    parser.add_argument("--force", action="store_true", help="overwrite a result that is there already")
    parser.add_argument("--json", metavar="FILE", help="write what was done as JSON; - writes it instead of the text")


def _run(arguments: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from dinov2.apps.convert import convert
    from dinov2.whole_files import write_text

    check_file_place(arguments.json, task="convert")
    size = arguments.img_size
    if size is not None and len(size) > 2:
        arguments.parser.error("--img-size takes one side, or height and width")
    with ExtractionProgress() as progress:
        result = convert(
            arguments.source,
            arguments.out,
            to=arguments.to,
            head=arguments.head,
            layers=arguments.layers,
            labels=arguments.labels,
            without_head=arguments.without_head,
            img_size=size[0] if size is not None and len(size) == 1 else size,
            patch_size=arguments.patch_size,
            in_chans=arguments.in_chans,
            ask_library=not arguments.skip_library,
            force=arguments.force,
            progress=progress,
        )
    text = json.dumps(result.as_json(), indent=2)
    if arguments.json == "-":
        say(text)
        return 0
    for note in result.notes:
        say(f"note: {note}")
    for reader, difference in result.differences.items():
        say(f"largest difference, {reader}: {difference:.3g}")
    say(f"written: {result.output} ({result.n_tensors} tensors, all accounted for; {', '.join(result.files)})")
    if arguments.json:
        write_text(Path(arguments.json).expanduser(), text + "\n")
    return 0
