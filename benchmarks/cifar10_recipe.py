"""What the CIFAR-10 preset reaches at a fraction of its length: several seeds, and one change at a time.

    python benchmarks/cifar10_recipe.py --data FOLDER [--share 0.1] [--seeds 0 1 2] [--variants preset no_koleo no_ibot]

FOLDER holds `train/<class>/*.jpg` and `test/<class>/*.jpg`. Every run keeps the schedules' shapes: an epoch becomes
shorter, not the number of epochs. Prints one line a run as it ends; with --json all of them are written at the end.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dinov2.apps.evaluation.context import EvalConfig
from dinov2.apps.evaluation.protocols import knn
from dinov2.apps.train import run_training
from dinov2.configs import load_config
from dinov2.eval.knn.evaluate import KnnSettings
from dinov2.eval.result import environment

VARIANTS: dict[str, list[str]] = {
    "preset": [],
    "no_koleo": ["dino.koleo_loss_weight=0"],
    "koleo_0.1": ["dino.koleo_loss_weight=0.1"],
    "no_ibot": ["ibot.loss_weight=0", "ibot.mask_sample_probability=0"],
    "no_dino": ["dino.loss_weight=0"],
    "momentum_0.99": ["teacher.momentum_teacher=0.99"],
    "moving_to_the_end": ["teacher.final_momentum_teacher=0.99", "optim.min_lr=5e-4"],
    "local_0": ["crops.local_crops_number=0"],
    "local_2": ["crops.local_crops_number=2"],
    "full_colour": ["crops.color_jitter_strength=1.0", "crops.grayscale_p=0.2", "crops.solarize_p=0.2"],
    "centering": ["train.centering=centering"],
    "release_decay": ["optim.layerwise_decay=0.9", "optim.patch_embed_lr_mult=0.2", "optim.weight_decay_end=0.4"],
}


def run(data: Path, variant: str, seed: int, share: float, threads: int) -> dict[str, Any]:
    """Trains one variant and returns its k-NN top-1 in per cent."""
    preset = load_config(None, preset="cifar10")
    epoch = max(1, round(preset.train.OFFICIAL_EPOCH_LENGTH * share))
    overrides = [
        f"train.dataset_path={data / 'train'}", f"train.seed={seed}", f"train.OFFICIAL_EPOCH_LENGTH={epoch}",
        f"train.num_threads={threads}", "train.checkpoint_every=0", "evaluation.eval_period_iterations=0",
        *VARIANTS[variant],
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        _, outcome = run_training(load_config(None, overrides, preset="cifar10"), output_dir=folder)
        seconds = time.perf_counter() - began
        images = {"train_dataset": str(data / "train"), "val_dataset": str(data / "test")}
        report = knn(EvalConfig(model=folder, output_dir=Path(folder) / "knn", **images), KnnSettings(nb_knn=[20]))
    figures = {"steps": outcome.step, "seconds": round(seconds), "top1": report.best_top1()}
    return {"variant": variant, "seed": seed, **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.1, help="of the preset's steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["preset"])
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; models this small gain little from more")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for variant in arguments.variants:
        for seed in arguments.seeds:
            rows.append(run(arguments.data, variant, seed, arguments.share, arguments.threads))
            row = rows[-1]
            figure = f"{row['top1']:.2f} % after {row['steps']} steps, {row['seconds']} s"
            print(f"{variant:14} seed {seed}: {figure}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
