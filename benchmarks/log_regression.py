"""Seconds of logistic regression for the whole grid of C beside scikit-learn, on features of real images.

    python benchmarks/log_regression.py TRAIN VAL --model M [--images 10000] [--rounds 3] [--json FILE]
        [--variants ours ours-one-by-one sklearn ...]

TRAIN and VAL are labelled data set strings or folders; the class tokens of `--images` training images, spread evenly
over the data set, are fitted with all 45 C, and all of VAL is scored. Rounds of the variants alternate; what counts
is the median of the ratios to the first variant of the same round, in seconds and, because other work on the machine
disturbs those less, in seconds of processor time. How far each is from the minimum is measured against a fit in
float64 with a hundredth of the tolerance. Threads are those of the environment (OMP_NUM_THREADS).
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dinov2.data.loaders import make_dataset
from dinov2.eval.log_regression import C_GRID, Fitted, fit_path
from dinov2.eval.result import environment
from dinov2.pretrained import Pretrained, load

Fit = Callable[[Tensor, Tensor, int, Sequence[float]], list[Fitted]]


def ours(dtype: torch.dtype = torch.float32, at_once: int | None = None, tol: float = 1e-4) -> Fit:
    def fit(X: Tensor, y: Tensor, n_classes: int, Cs: Sequence[float]) -> list[Fitted]:
        return fit_path(X, y, n_classes=n_classes, Cs=Cs, dtype=dtype, at_once=at_once, tol=tol)

    return fit


def sklearn(tol: float, dtype: torch.dtype = torch.float64) -> Fit:
    def fit(X: Tensor, y: Tensor, n_classes: int, Cs: Sequence[float]) -> list[Fitted]:
        return fit_path(X, y, n_classes=n_classes, Cs=Cs, tol=tol, dtype=dtype, backend="sklearn")

    return fit


VARIANTS: dict[str, Fit] = {
    "ours": ours(),
    "ours-float64": ours(torch.float64),
    "ours-one-by-one": ours(at_once=1),
    "ours-all-at-once": ours(at_once=len(C_GRID)),
    "sklearn": sklearn(1e-4),
    "sklearn-float32": sklearn(1e-4, torch.float32),
    "sklearn-tight": sklearn(1e-6),
}


def features_of(model: Pretrained, dataset: str, n_images: int | None) -> tuple[Tensor, Tensor]:
    """Class tokens [S, D] and labels [S]."""
    images = make_dataset(dataset, transform=model.transform)
    n_all = len(images)
    numbers = range(n_all) if n_images is None else [i * n_all // n_images for i in range(min(n_images, n_all))]
    tokens, labels = [], []
    for first in range(0, len(numbers), 256):
        batch = [images[i] for i in numbers[first : first + 256]]
        tokens.append(model.encode(torch.stack([image for image, _ in batch])).cls.cpu())
        labels += [int(label) for _, label in batch]
    return torch.cat(tokens), torch.tensor(labels)


def objectives(fits: list[Fitted], X: Tensor, y: Tensor) -> list[float]:
    """Mean loss and penalty in float64."""
    losses = [float(torch.nn.functional.cross_entropy(fit.scores(X.double()), y)) for fit in fits]
    return [
        loss + float(fit.weights.square().sum()) / (2 * fit.C * len(X)) for loss, fit in zip(losses, fits, strict=True)
    ]


def accuracies(fits: list[Fitted], X: Tensor, y: Tensor) -> list[float]:
    return [float((fit.scores(X).argmax(dim=1) == y).double().mean()) for fit in fits]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("val")
    parser.add_argument("--model", required=True)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=["ours", "sklearn"], choices=list(VARIANTS))
    parser.add_argument("--json")
    arguments = parser.parse_args()

    model = load(arguments.model, device="cpu", precision="fp32")
    X, y = features_of(model, arguments.train, arguments.images)
    X_val, y_val = features_of(model, arguments.val, None)
    n_classes = int(y.max()) + 1
    exact = ours(torch.float64, tol=1e-6)(X, y, n_classes, C_GRID)
    lowest, expected = objectives(exact, X, y), accuracies(exact, X_val, y_val)
    print(f"{len(X)} x {X.shape[1]} features, {n_classes} classes, {len(C_GRID)} C; accuracy up to {max(expected):.4f}")

    wall: dict[str, list[float]] = {name: [] for name in arguments.variants}
    processor: dict[str, list[float]] = {name: [] for name in arguments.variants}
    found: dict[str, Any] = {}
    for number in range(arguments.rounds):
        for name in arguments.variants:
            began, began_processor = time.perf_counter(), time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fits = VARIANTS[name](X, y, n_classes, C_GRID)
            wall[name].append(time.perf_counter() - began)
            processor[name].append(time.process_time() - began_processor)
            gaps = [a - b for a, b in zip(objectives(fits, X, y), lowest, strict=True)]
            differences = [abs(a - b) for a, b in zip(accuracies(fits, X_val, y_val), expected, strict=True)]
            found[name] = {
                "worst_gap_of_mean_objective": max(gaps),
                "worst_accuracy_difference": max(differences),
                "iterations": sum(fit.n_iterations for fit in fits),
            }
            print(f"round {number} {name:16} {wall[name][-1]:7.2f} s, {processor[name][-1]:7.2f} s of processor")
    first = arguments.variants[0]
    for name in arguments.variants:
        ratios = [a / b for a, b in zip(wall[name], wall[first], strict=True)]
        processor_ratios = [a / b for a, b in zip(processor[name], processor[first], strict=True)]
        found[name] |= {
            "seconds": statistics.median(wall[name]),
            "processor_seconds": statistics.median(processor[name]),
            f"ratio_to_{first}": statistics.median(ratios),
            f"processor_ratio_to_{first}": statistics.median(processor_ratios),
        }
        print(name, json.dumps(found[name]))
    figures = {"images": len(X), "width": X.shape[1], "n_classes": n_classes, "n_C": len(C_GRID), "variants": found}
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({**figures, "versions": environment()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
