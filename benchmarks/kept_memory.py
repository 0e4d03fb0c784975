"""What training on a CPU gains when the C library keeps freed memory (`dinov2.engine.memory`), and what that costs.

    python benchmarks/kept_memory.py [--models small vits14] [--steps 9] [--rounds 3] [--json FILE]

The setting holds for a whole process, so that processes with and without it take turns. Each runs some steps; medians
over its steps are compared within a round.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from train_step import COMMON, MODELS, Ours, make_batch

from dinov2.configs import load_config
from dinov2.engine.memory import keep_freed_memory
from dinov2.engine.progress import peak_memory
from dinov2.eval.result import environment


def steps_of_child(model: str, n_steps: int, *, kept: bool) -> dict[str, Any]:
    """Steps in this process: median seconds, median page faults, and the peak of its memory."""
    cfg = load_config(None, [*MODELS[model], *COMMON])
    device = torch.device("cpu")
    batch, run = make_batch(cfg, device), Ours(cfg, device, None)
    seconds, faults = [], []
    with keep_freed_memory(device) if kept else nullcontext(False) as is_kept:
        if is_kept != kept:
            raise SystemExit("this C library cannot be told to keep memory: there is nothing to measure")
        run.step(batch)
        for _ in range(n_steps):
            before, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
            run.step(batch)
            seconds.append(time.perf_counter() - start)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return {
        "seconds": statistics.median(seconds),
        "page_faults": statistics.median(faults),
        "peak_bytes": peak_memory(device),
    }


def compare(model: str, n_steps: int, n_rounds: int) -> dict[str, Any]:
    """Rounds of one child each; the ratio is time without over time with kept memory, above 1 when that is faster."""
    results: dict[str, list[dict[str, Any]]] = {"returned": [], "kept": []}
    for i in range(n_rounds):
        for name in list(results) if i % 2 else list(results)[::-1]:
            command = [sys.executable, __file__, "--child", name, "--models", model, "--steps", str(n_steps)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[name].append(json.loads(output.splitlines()[-1]))
    pairs = zip(results["returned"], results["kept"], strict=True)
    ratios = sorted(returned["seconds"] / kept["seconds"] for returned, kept in pairs)
    medians = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in results.items()
    }
    return {"model": model, "speedup": statistics.median(ratios), "speedups": ratios, **medians}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--steps", type=int, default=9, help="steps of one process behind the first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=["returned", "kept"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(steps_of_child(arguments.models[0], arguments.steps, kept=arguments.child == "kept")))
        return
    rows = []
    for model in arguments.models:
        rows.append(row := compare(model, arguments.steps, arguments.rounds))
        print(f"{model}: {row['speedup']:.2f} times as fast {[round(value, 2) for value in row['speedups']]}")
        for name in ("returned", "kept"):
            found = row[name]
            gib = found["peak_bytes"] / 2**30
            print(f"  {name}: {found['seconds']:.3f} s, {found['page_faults']:.0f} page faults, {gib:.2f} GiB")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows, "environment": environment()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
