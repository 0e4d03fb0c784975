"""Seconds a training step, peak memory and where the time goes, beside a plain baseline in the same run.

    python benchmarks/train_step.py [--models small vits14] [--precisions fp32 bf16] [--rounds 9] [--json FILE]

The baseline is what one would write first: every crop size goes through the student by itself, stochastic depth zeroes
finished residuals sample by sample, and the losses are plain log-softmax products for every pair of crops. Models,
optimiser, teacher update and crops are the same. Steps of the two alternate; medians over the rounds are compared. Peak
memory is that of a child process for each variant.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dinov2.configs import Config, load_config
from dinov2.data.crops.collate import CropBatch
from dinov2.data.crops.config import AugmentationConfig
from dinov2.data.crops.masking import sample_masks
from dinov2.engine.optim import apply_hyper, build_optimizer, guarded_step
from dinov2.engine.parallel import autocast, choose_device, choose_precision
from dinov2.engine.progress import peak_memory
from dinov2.engine.schedules import Hyper
from dinov2.eval.result import environment
from dinov2.loss.sinkhorn import sinkhorn_knopp
from dinov2.train.ssl_meta_arch import SSLMetaArch

MODELS: dict[str, list[str]] = {
    # The CIFAR-10 recipe with the release's stochastic depth and iBOT switched on.
    "small": [
        "student.arch=vit_nano", "student.patch_size=8", "crops.global_crops_size=32", "crops.local_crops_size=16",
        "crops.local_crops_number=4", "train.batch_size_per_gpu=64", "dino.head_n_prototypes=1024",
        "dino.head_hidden_dim=256", "dino.head_bottleneck_dim=64", "dino.head_nlayers=2", "student.drop_path_rate=0.1",
    ],
    "vits14": [
        "student.arch=vit_small", "student.patch_size=14", "crops.local_crops_size=98", "train.batch_size_per_gpu=8",
    ],
}  # fmt: skip
COMMON = ["train.centering=sinkhorn_knopp", "student.drop_path_uniform=true", "student.layerscale=0.1"]
HYPER = Hyper(lr=1e-4, weight_decay=0.04, momentum=0.99, teacher_temp=0.05, last_layer_lr=1e-4)


def make_batch(cfg: Config, device: torch.device) -> CropBatch:
    """Random crops with masks of the release's distribution."""
    images, size = cfg.train.batch_size_per_gpu, cfg.crops.global_crops_size
    config = AugmentationConfig.from_config(cfg)
    masks = sample_masks(config, seed=0, step=0, sample_numbers=torch.arange(images).numpy(), global_batch=images)
    generator = torch.Generator().manual_seed(0)
    side = cfg.crops.local_crops_size
    batch = CropBatch.from_crops(
        torch.randn(2 * images, 3, size, size, generator=generator),
        torch.randn(cfg.crops.local_crops_number * images, 3, side, side, generator=generator),
        masks,
        sample_numbers=torch.arange(images),
    )
    return batch.to(device)


class Ours:
    """The step as `dinov2.train.train` runs it."""

    per_sample = False

    def __init__(self, cfg: Config, device: torch.device, precision: torch.dtype | None) -> None:
        torch.manual_seed(0)
        self.ssl = SSLMetaArch(cfg, precision=precision).to(device).train()
        for block in self.ssl.student["backbone"].block_list:
            block.drop_path_per_sample = self.per_sample
        self.parts = self.ssl.trained_parts()
        self.optimizer = build_optimizer(self.parts, cfg.optim)
        self.device = device

    def total(self, batch: CropBatch) -> Tensor:
        return self.ssl(batch, HYPER).total

    def step(self, batch: CropBatch) -> dict[str, float]:
        """One step; seconds by phase."""
        marks = [self._now()]
        apply_hyper(self.optimizer, HYPER)
        total = self.total(batch)
        marks.append(self._now())
        total.backward()
        marks.append(self._now())
        outcome = guarded_step(self.optimizer, self.parts, 3.0, loss=total)
        self.optimizer.zero_grad(set_to_none=True)
        marks.append(self._now())
        self.ssl.update_teacher(HYPER.momentum, finite=outcome.finite)
        marks.append(self._now())
        phases = ("forward and losses", "backward", "optimiser", "teacher")
        return dict(zip(phases, (b - a for a, b in pairwise(marks)), strict=True))

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class Plain(Ours):
    """The same objective, written as one would first."""

    per_sample = True

    def total(self, batch: CropBatch) -> Tensor:
        ssl = self.ssl
        student, teacher = ssl.student, ssl.teacher
        assert batch.local_crops is not None
        with autocast(self.device, ssl.precision):
            with torch.no_grad():
                features = teacher["backbone"].forward_features(batch.global_crops)
                cls = sinkhorn_knopp(teacher["dino_head"](features["x_norm_clstoken"]), HYPER.teacher_temp)
                patches = features["x_norm_patchtokens"][batch.masks]
                patch_targets = sinkhorn_knopp(teacher["dino_head"](patches), HYPER.teacher_temp)
            global_features = student["backbone"].forward_features(batch.global_crops, batch.masks)
            local_features = student["backbone"].forward_features(batch.local_crops)
            global_scores = student["dino_head"](global_features["x_norm_clstoken"]).chunk(2)
            n_local = len(batch.local_crops) // (len(batch.global_crops) // 2)
            local_scores = student["dino_head"](local_features["x_norm_clstoken"]).chunk(n_local)
            patch_scores = student["dino_head"](global_features["x_norm_patchtokens"][batch.masks])
        targets = cls.chunk(2)
        pairs = [(score, target) for score in local_scores for target in targets]
        pairs += [(global_scores[0], targets[1]), (global_scores[1], targets[0])]
        loss = torch.stack([-(t * log_probabilities(s)).sum(dim=-1).mean() for s, t in pairs]).mean()
        per_patch = -(patch_targets * log_probabilities(patch_scores)).sum(dim=-1)
        loss = loss + (per_patch * batch.mask_weights).sum() / len(batch.masks)
        for crop in global_features["x_norm_clstoken"].float().chunk(2):
            z = F.normalize(crop, dim=-1)
            nearest = (z @ z.T - 2 * torch.eye(len(z), device=z.device)).argmax(dim=1)
            loss = loss - 0.1 * torch.log((z - z[nearest] + 1e-8).norm(dim=1) + 1e-8).mean()
        return loss


def log_probabilities(scores: Tensor) -> Tensor:
    return (scores.float() / 0.1).log_softmax(dim=-1)


VARIANTS = {"ours": Ours, "plain": Plain}


def compare(name: str, precision: str, rounds: int, device: torch.device) -> dict[str, Any]:
    """Medians of alternating steps of the two variants."""
    cfg = load_config(None, [*MODELS[name], *COMMON])
    batch = make_batch(cfg, device)
    runs = {key: cls(cfg, device, choose_precision(precision, device)) for key, cls in VARIANTS.items()}
    for run in runs.values():
        run.step(batch)
    seconds: dict[str, list[float]] = {key: [] for key in runs}
    phases: dict[str, list[dict[str, float]]] = {key: [] for key in runs}
    for i in range(rounds):
        for key in list(runs) if i % 2 else list(runs)[::-1]:
            phases[key].append(runs[key].step(batch))
            seconds[key].append(sum(phases[key][-1].values()))
    ratios = sorted(p / o for p, o in zip(seconds["plain"], seconds["ours"], strict=True))
    return {
        "model": name,
        "precision": precision,
        "seconds": {key: statistics.median(values) for key, values in seconds.items()},
        "speedup": statistics.median(ratios),
        "speedup_spread": [ratios[len(ratios) // 4], ratios[-len(ratios) // 4]],
        "phases": {
            key: {phase: statistics.median(row[phase] for row in rows) for phase in rows[0]}
            for key, rows in phases.items()
        },
        "peak_bytes": {key: peak_of_child(name, precision, key, device) for key in VARIANTS},
    }


def peak_of_child(name: str, precision: str, variant: str, device: torch.device) -> int:
    """Peak memory of two steps in a process of their own."""
    command = [sys.executable, __file__, "--child", variant, "--models", name, "--precisions", precision]
    output = subprocess.run([*command, "--device", str(device)], check=True, capture_output=True, text=True).stdout
    return int(output.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16", "fp16"], default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=list(VARIANTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    if arguments.child:
        cfg = load_config(None, [*MODELS[arguments.models[0]], *COMMON])
        run = VARIANTS[arguments.child](cfg, device, choose_precision(arguments.precisions[0], device))
        batch = make_batch(cfg, device)
        for _ in range(2):
            run.step(batch)
        print(peak_memory(device))
        return
    rows = []
    for name in arguments.models:
        for precision in arguments.precisions:
            row = compare(name, precision, arguments.rounds, device)
            rows.append(row)
            ours, plain = row["seconds"]["ours"], row["seconds"]["plain"]
            low, high = row["speedup_spread"]
            memory = {key: value / 2**30 for key, value in row["peak_bytes"].items()}
            print(f"{name} {precision}: ours {ours:.3f} s, plain {plain:.3f} s, plain/ours {row['speedup']:.2f} "
                  f"({low:.2f} to {high:.2f}); peak {memory['ours']:.2f} and {memory['plain']:.2f} GiB")  # fmt: skip
            for key in VARIANTS:
                parts = ", ".join(f"{phase} {value:.3f}" for phase, value in row["phases"][key].items())
                print(f"    {key}: {parts}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
