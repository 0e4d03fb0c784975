"""Two checkouts of this repository side by side: seconds of the same work in the same run, alternating.

    python benchmarks/checkouts.py OLD NEW [--rounds 7] [--only TASK ...] [--threads 1] [--json FILE]

Each checkout works in a process of its own that is asked for one task after the other; a ratio is the median over the
rounds of the old one's processor seconds divided by the new one's, with its quartiles: 1.05 is 5 % faster. Tasks of the
command line start fresh processes. Work is what users do: backbones, `dinov2.hf`, a training, `embed`, k-NN, start-up.
"""

import argparse
import contextlib
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Task = Callable[[], object]


def first_of(*places: str) -> Any:
    """The first of several `module:name` that exists: checkouts differ in where things are."""
    for place in places:
        module, _, name = place.partition(":")
        with contextlib.suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(module), name)
    raise ImportError(f"none of {places} exists in this checkout")


def backbone_tasks() -> dict[str, Task]:
    """Own backbones and `dinov2.hf`, float32 and bfloat16, one image and eight."""
    import torch

    from dinov2.models import vision_transformer

    optimize = first_of("dinov2.models.inference:optimize_for_inference", "dinov2.models.inference:prepared")
    tasks: dict[str, Task] = {}
    for size, width, heads in (("small", 384, 6), ("base", 768, 12)):
        model = getattr(vision_transformer, f"vit_{size}")(
            patch_size=14, img_size=518, init_values=1.0, block_chunks=0
        ).eval()
        forms = {"float32": model, "bfloat16": optimize(model, torch.bfloat16)}
        for batch in (1, 8):
            images = torch.randn(batch, 3, 224, 224)
            for form, backbone in forms.items():
                tasks[f"{size} {form} batch {batch}"] = lambda b=backbone, x=images: b.forward_features(x)
        with contextlib.suppress(ImportError):
            from dinov2.hf import Dinov2Config, Dinov2Model

            peer = Dinov2Model(Dinov2Config(hidden_size=width, num_attention_heads=heads, image_size=518)).eval()
            for batch in (1, 8):
                images = torch.randn(batch, 3, 224, 224)
                tasks[f"hf {size} float32 batch {batch}"] = lambda p=peer, x=images: p(x)
    return tasks


def work_tasks(folder: Path) -> dict[str, Task]:
    """A short training, `embed` of a few pictures, k-NN, and loading a small model."""
    import torch

    import dinov2
    from dinov2.cli import main
    from dinov2.models.vision_transformer import vit_nano

    train = importlib.import_module("dinov2.train.train").train
    load_config = importlib.import_module("dinov2.configs").load_config
    search = first_of("dinov2.eval.knn.search:nearest_neighbours", "dinov2.eval.neighbours.search:nearest_neighbours")
    if not (folder / "images").exists():
        from PIL import Image

        (folder / "images").mkdir()
        for number in range(64):
            pixels = torch.randint(0, 256, (300, 400, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / "images" / f"{number}.jpg")
        torch.save(
            vit_nano(patch_size=14, img_size=224, init_values=1.0, block_chunks=0).state_dict(), folder / "m.pth"
        )
    count = iter(range(10**6))

    def training(*overrides: str) -> Task:
        keys = ("train.num_workers=0", "train.num_threads=1", "evaluation.eval_period_iterations=0", *overrides)
        cfg = load_config(None, list(keys), preset="toy")
        return lambda: train(cfg, folder / f"{os.getpid()}-{next(count)}", max_steps=4, announce=lambda text: None)

    def embed() -> object:
        out = folder / f"{os.getpid()}-{next(count)}.parquet"
        with contextlib.redirect_stdout(None):
            return main(
                ["embed", str(folder / "images"), "-m", str(folder / "m.pth"), "-o", str(out), "--device", "cpu"]
            )

    generator = torch.Generator().manual_seed(0)
    queries, rows = (torch.randn(n, 384, generator=generator) for n in (500, 50_000))
    small = (
        "student.arch=vit_small",
        "student.patch_size=14",
        "crops.global_crops_size=98",
        "crops.local_crops_size=42",
    )
    return {
        "train toy, 4 steps": training(),
        "train ViT-S/14, 4 steps": training(*small, "train.batch_size_per_gpu=8"),
        "embed 64 pictures": embed,
        "k-NN": lambda: search(queries, rows, k=20, cosine=True),
        "dinov2.load": lambda: dinov2.load(folder / "m.pth", device="cpu"),
    }


PROCESSES = {
    "import dinov2": [sys.executable, "-c", "import dinov2"],
    "dinov2 --help": [sys.executable, "-m", "dinov2", "--help"],
}


def serve(folder: Path, threads: int) -> None:
    """Run the tasks that standard input names; answers are processor seconds, one JSON object a line."""
    import torch

    torch.set_num_threads(threads)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.manual_seed(0)
    tasks = {**backbone_tasks(), **work_tasks(folder)}
    print(json.dumps(list(tasks)), file=answers, flush=True)
    for line in sys.stdin:
        inference = torch.inference_mode() if "batch" in line else contextlib.nullcontext()
        with inference:
            began = time.process_time()
            tasks[line.strip()]()
            print(json.dumps(time.process_time() - began), file=answers, flush=True)


def in_a_process(command: list[str], checkout: Path) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=checkout, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="+", type=Path, metavar="OLD NEW")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="tasks whose name holds one of these")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.threads)
        return
    old, new = (path.resolve() for path in options.checkouts)
    with tempfile.TemporaryDirectory() as folder:
        workers = {}
        for checkout in (old, new):
            place = Path(folder, str(len(workers)))
            place.mkdir()
            command = [
                sys.executable,
                __file__,
                str(old),
                str(new),
                "--serve",
                str(place),
                "--threads",
                str(options.threads),
            ]
            workers[checkout] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=place,
                env={**os.environ, "PYTHONPATH": str(checkout)},
            )  # fmt: skip
        names = [json.loads(worker.stdout.readline()) for worker in workers.values() if worker.stdout]
        tasks = [name for name in [*names[0], *PROCESSES] if name in names[1] or name in PROCESSES]
        results = {}
        for task in [t for t in tasks if not options.only or any(text in t for text in options.only)]:
            seconds: dict[Path, list[float]] = {old: [], new: []}
            for number in range(options.rounds + 1):  # the first loads code and fills caches
                for checkout in (old, new) if number % 2 else (new, old):
                    seconds[checkout].append(ask(workers[checkout], task, checkout))
            ratios = sorted(a / b for a, b in zip(seconds[old][1:], seconds[new][1:], strict=True))
            low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
            results[task] = {"ratio": median, "low": low, "high": high, "seconds": statistics.median(seconds[new][1:])}
            print(f"{task:28} {median:5.2f} ({low:.2f} to {high:.2f})  {results[task]['seconds']:.3g} s", flush=True)
        for worker in workers.values():
            worker.kill()
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def ask(worker: "subprocess.Popen[str]", task: str, checkout: Path) -> float:
    """Processor seconds of one task."""
    if task in PROCESSES:
        return in_a_process(PROCESSES[task], checkout)
    assert worker.stdin and worker.stdout
    print(task, file=worker.stdin, flush=True)
    return float(json.loads(worker.stdout.readline()))


if __name__ == "__main__":
    main()
