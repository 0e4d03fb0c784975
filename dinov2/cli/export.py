"""`dinov2 export`."""

import argparse
from typing import TYPE_CHECKING

from dinov2.cli.common import ExtractionProgress, add_command, check_file_place, positive, say

if TYPE_CHECKING:
    from dinov2.apps.export import ExportReport

__all__ = ["add_to"]


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "export",
        _run,
        help="write a model as ONNX or torch.export, compared with PyTorch",
        description="Write a model as ONNX or torch.export. One file takes any batch, height and width (multiples of\n"
        "the patch size). The file is opened again and compared with PyTorch; one that differs is not kept.",
        example="dinov2 export dinov2_vits14_reg -o dinov2_vits14_reg.onnx --int8",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a release, a weight file, a run's folder, a Hugging Face folder"
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT", help="the file, ending in .onnx or .pt2, or a folder"
    )
    parser.add_argument("--head", metavar="FILE", help="a linear classifier to put on top of a backbone")
    parser.add_argument(
        "--format", choices=["onnx", "torch"], help="what to write (default: what the file's ending says)"
    )
    parser.add_argument(
        "--outputs",
        choices=["cls", "tokens", "both", "logits"],
        help="what the model returns: class token, all tokens, both, or a classifier's logits (default: logits of a "
        "classifier, both of a backbone)",
    )
    parser.add_argument(
        "--int8", action="store_true", help="also write OUT.int8.onnx by dynamic quantisation, and measure it"
    )
    parser.add_argument("--opset", type=positive, default=20, metavar="N", help="ONNX operator set (default: 20)")
    parser.add_argument(
        "--check-sizes",
        nargs="+",
        type=_size,
        default=[],
        metavar="HxW",
        help="image sizes to compare at, or BxHxW (default: 16x16 and 7x11 patches and the native size)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="X",
        help="largest difference to PyTorch, relative to the largest value where that is above 1 (default: 1e-4)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the summary to this file too")


def _run(arguments: argparse.Namespace) -> int:
    from dinov2.apps.export import export

    check_file_place(arguments.json, task="export")
    with ExtractionProgress() as progress:
        report = export(
            arguments.model,
            output=arguments.output,
            format=arguments.format,
            head=arguments.head,
            outputs=arguments.outputs,
            int8=arguments.int8,
            opset=arguments.opset,
            check_sizes=arguments.check_sizes,
            tolerance=arguments.tolerance,
            json_file=arguments.json,
            say=say,
            progress=progress,
        )
    for line in _lines(report):
        say(line)
    return 0


def _lines(report: "ExportReport") -> list[str]:
    lines = ["largest difference to PyTorch, images x height x width:"]
    for found in report.comparisons:
        errors = "  ".join(
            f"{name} {error:.1e} (values up to {found.largest[name]:.2g})" for name, error in found.errors.items()
        )
        lines.append(f"  {_times(found.size):16} {errors}")
    if report.int8 is not None:
        for name, cosine in report.int8.cosine.items():
            lines.append(f"int8: {name} cosine >= {cosine:.5f}, relative L2 <= {report.int8.relative_l2[name]:.4f}")
        plain, small = report.int8.milliseconds["float32"], report.int8.milliseconds["int8"]
        lines.append(
            f"int8: {small:.1f} ms, float32 {plain:.1f} ms, for {_times(report.int8.timed)} in onnxruntime on "
            f"{report.int8.threads} threads"
        )
        lines.append(f"written: {report.int8.path} ({report.int8.size_bytes / 1e6:.1f} MB)")
    patch = report.metadata["patch_size"]
    lines.append(f"written: {report.path} ({report.size_bytes / 1e6:.1f} MB), sides are multiples of {patch}")
    return lines


def _times(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))


def _size(text: str) -> tuple[int, ...]:
    """`224x224` or `3x224x224` as numbers, for argparse."""
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write HEIGHTxWIDTH such as 224x224, or BATCHxHxW")
    return tuple(int(part) for part in parts)
