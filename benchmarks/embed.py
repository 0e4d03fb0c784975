"""Images per second of `dinov2 embed` beside the model alone, and its peak memory.

    python benchmarks/embed.py IMAGES --model M [--images 256] [--rounds 7] [--precision auto] [--json FILE]

The model alone gets batches that are decoded already, as many as the command reads from disk; rounds of the two
alternate, and the median of their ratios is what counts. Decoding is measured by itself on one thread. Peak memory is
that of a child process that embeds all of IMAGES, and of one that only loads the model and runs one batch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dinov2.apps.embed import embed, image_source
from dinov2.encode.stream import EmbeddingSpec, decoded_batches, encode_batch
from dinov2.engine.progress import peak_memory
from dinov2.eval.result import environment
from dinov2.pretrained import Pretrained, load


def model_alone(model: Pretrained, batches: list[Any]) -> float:
    """Images per second of batches in memory."""
    began = time.perf_counter()
    for batch in batches:
        encode_batch(lambda pixels: EmbeddingSpec().columns(model.encode(pixels)), batch)
    return sum(len(batch.indices) for batch in batches) / (time.perf_counter() - began)


def whole_command(images: list[str], arguments: argparse.Namespace, folder: str, number: int) -> float:
    """Images per second of the command, from disk to disk."""
    report = embed(
        images,
        model=arguments.model,
        output=Path(folder) / f"{number}.parquet",
        batch_size=arguments.batch_size,
        threads=arguments.threads,
        device=arguments.device,
        precision=arguments.precision,
    )
    assert report.images_per_second is not None
    return report.images_per_second


def child(words: list[str]) -> dict[str, Any]:
    """What a child process of this file prints."""
    result = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--model", required=True)
    parser.add_argument("--images", type=int, default=256, help="images a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--json")
    parser.add_argument("--memory-of", choices=["command", "model"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    source = image_source(arguments.source)
    model = load(arguments.model, device=arguments.device, precision=arguments.precision)
    chosen = range(min(arguments.images, len(source)))
    batches = [chosen[first : first + arguments.batch_size] for first in range(0, len(chosen), arguments.batch_size)]
    if arguments.memory_of:
        if arguments.memory_of == "command":
            with tempfile.TemporaryDirectory() as folder:
                whole_command([arguments.source], arguments, folder, 0)
        else:
            model_alone(model, list(decoded_batches(source, batches[:1], transform=model.transform)))
        print(json.dumps({"peak_bytes": peak_memory()}))
        return

    began = time.process_time()
    decoded = list(decoded_batches(source, batches, transform=model.transform))
    decoding = (time.process_time() - began) / len(chosen)
    paths = [source.path_of(index) for index in chosen]
    model_alone(model, decoded[:1])
    alone, whole = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            alone.append(model_alone(model, decoded))
            whole.append(whole_command(paths, arguments, folder, number))
            ratio = statistics.median(w / a for w, a in zip(whole, alone, strict=True))
            print(f"round {number}: model alone {alone[-1]:.1f}, embed {whole[-1]:.1f} images/s, ratio {ratio:.3f}")
    common = [arguments.source, "--model", arguments.model, "--batch-size", str(arguments.batch_size)]
    common += ["--device", arguments.device, "--precision", arguments.precision]
    figures = {
        "images_a_round": len(chosen),
        "model_alone_images_per_second": statistics.median(alone),
        "embed_images_per_second": statistics.median(whole),
        "ratios": [w / a for w, a in zip(whole, alone, strict=True)],
        "median_ratio": statistics.median(w / a for w, a in zip(whole, alone, strict=True)),
        "decoding_cpu_seconds_per_image": decoding,
        "peak_bytes_embed_all": child([*common, "--memory-of", "command"])["peak_bytes"],
        "peak_bytes_model_one_batch": child([*common, "--memory-of", "model"])["peak_bytes"],
        "images_in_all": len(source),
        "precision": str(model.autocast_dtype or "float32"),
        "device": str(model.device),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch_threads": torch.get_num_threads(),
        "environment": environment(),
    }
    text = json.dumps(figures, indent=2)
    print(text)
    if arguments.json:
        Path(arguments.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
