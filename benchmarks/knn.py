"""Seconds and memory of the exact k-NN search beside the bare matrix product and FAISS's flat index.

    python benchmarks/knn.py [--rows 1281167] [--width 384] [--queries 5000] [--k 20] [--threads 2] [--rounds 3]
                             [--only NAME ...] [--clock wall|cpu] [--no-memory] [--json FILE]

Rows are random unit vectors. The bare product multiplies the same matrices in blocks and keeps nothing. All contenders
take turns, and medians of the rounds and of the ratios within a round count. On a machine that has other work to do,
`--clock cpu --threads 1` counts the processor's time, which others lengthen less than the wall's. The neighbours of all
products are compared with each other and, where it is installed, with FAISS's.

Memory is that of a child process for each product: its peak, less what it held with imports, matrix and queries.
`--only` names the contenders (product, float32, bfloat16, auto, faiss); without it, bfloat16 runs where `auto` takes
it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dinov2.engine.parallel import choose_precision
from dinov2.eval.knn.search import nearest_neighbours
from dinov2.eval.result import environment

PRODUCTS = ("float32", "bfloat16", "auto")


def unit_rows(n: int, width: int, seed: int) -> Tensor:  # [n, D]
    """Random directions, made in blocks so that nothing but the result takes memory."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.empty(n, width)
    for block in rows.split(16384):
        block.normal_(generator=generator)
        block /= torch.linalg.vector_norm(block, dim=1, keepdim=True)
    return rows


def bare_product(queries: Tensor, train: Tensor, query_block: int, train_block: int) -> None:
    """All similarities, each block over the last one."""
    memory = torch.empty(query_block * train_block)
    for rows in train.split(train_block):
        for block in queries.split(query_block):
            torch.mm(block, rows.T, out=memory[: len(block) * len(rows)].view(len(block), len(rows)))


def faiss_flat(queries: Tensor, train: Tensor, k: int, threads: int) -> tuple[Callable[[], Any], Any]:
    """A search in a flat index that is built already, and the index."""
    import faiss

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(train.shape[1])
    index.add(train.numpy())
    return lambda: index.search(queries.numpy(), k), index


def contenders(names: list[str], queries: Tensor, train: Tensor, k: int, threads: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    found: dict[str, Callable[[], Any]] = {}
    for name in names:
        if name == "product":
            # Two shapes of blocks: the one that the search uses, and the whole of the queries at once.
            found["product"] = lambda: bare_product(queries, train, 512, 4096)
            found["product, large blocks"] = lambda: bare_product(queries, train, len(queries), 16384)
        elif name == "faiss":
            try:
                found["faiss flat"] = faiss_flat(queries, train, k, threads)[0]
            except ImportError:
                print("FAISS is not installed (pip install faiss-cpu) and left out", file=sys.stderr)
        elif name in PRODUCTS:
            found[name] = lambda name=name: nearest_neighbours(queries, train, k=k, product=name)  # type: ignore[misc]
        else:
            raise SystemExit(f"no contender is called {name!r}; choose product, faiss, {', '.join(PRODUCTS)}")
    return found


def memory_of(field: str) -> int:
    """Bytes of a line of this process's status: VmRSS is now, VmHWM the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not say how much memory a process holds; run with --no-memory")


def child(arguments: argparse.Namespace) -> None:
    """Print the memory that one search took, in bytes."""
    train = unit_rows(arguments.rows, arguments.width, 0)
    queries = unit_rows(arguments.queries, arguments.width, 1)
    before = memory_of("VmRSS")
    nearest_neighbours(queries, train, k=arguments.k, product=arguments.child)
    print(json.dumps({"held_before": before, "extra": memory_of("VmHWM") - before}))


def extra_memory(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Bytes that a search by this product takes, from a process of its own."""
    flags = [f"--{key}={getattr(arguments, key)}" for key in ("rows", "width", "queries", "k", "threads")]
    output = subprocess.run(
        [sys.executable, __file__, "--child", name, *flags], check=True, capture_output=True, text=True
    ).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return {**found, "of_the_matrix": found["extra"] / (arguments.rows * arguments.width * 4)}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, value in {"rows": 1_281_167, "width": 384, "queries": 5000, "k": 20, "threads": 2, "rounds": 3}.items():
        parser.add_argument(f"--{flag}", type=int, default=value)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contenders")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="whose seconds count")
    parser.add_argument("--no-memory", action="store_true", help="measure time alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go")
    parser.add_argument("--child", choices=PRODUCTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        child(arguments)
        return

    fastest = "bfloat16" if choose_precision("auto", torch.device("cpu")) is torch.bfloat16 else "float32"
    names = arguments.only or list(dict.fromkeys(["product", "float32", fastest, "faiss"]))
    products = [name for name in names if name in PRODUCTS]
    # Before the matrix is made here: two at once would be too much for a small machine.
    memory = {} if arguments.no_memory else {name: extra_memory(name, arguments) for name in products}

    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    train = unit_rows(arguments.rows, arguments.width, 0)
    queries = unit_rows(arguments.queries, arguments.width, 1)
    runs = contenders(names, queries, train, arguments.k, arguments.threads)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    load: list[float] = []
    results: dict[str, Any] = {}
    for _ in range(arguments.rounds):
        load.append(os.getloadavg()[0])
        for name, run in runs.items():
            began = clock()
            results[name] = run()
            seconds[name].append(clock() - began)
            print(f"{name:22} {seconds[name][-1]:8.2f} s", file=sys.stderr, flush=True)
    report = {
        "sizes": {key: getattr(arguments, key) for key in ("rows", "width", "queries", "k", "threads", "rounds")},
        "clock": arguments.clock,
        "fastest_product": fastest,
        "seconds": seconds,
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "over_product": ratios(seconds, "product"),
        "over_faiss": ratios(seconds, "faiss flat"),
        "memory": memory,
        "same_neighbours": agreement(results),
        "load_before_each_round": load,
        "environment": environment(),
    }
    print(json.dumps(report, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def ratios(seconds: dict[str, list[float]], base: str) -> dict[str, float]:
    """Medians of the ratios within a round; of two shapes of the bare product the faster one is the base."""
    bases = [values for name, values in seconds.items() if name.startswith(base)]
    best = [min(values) for values in zip(*bases, strict=True)]
    return {
        name: statistics.median(one / other for one, other in zip(values, best, strict=True))
        for name, values in seconds.items()
        if best and not name.startswith(base)
    }


def agreement(results: dict[str, Any]) -> dict[str, Any]:
    """Whether the products gave the very same neighbours, and the share that FAISS's have in common with theirs."""
    exact = {name: found for name, found in results.items() if name in PRODUCTS}
    found: dict[str, Any] = {}
    if exact:
        first = next(iter(exact.values()))
        found["products"] = all(
            torch.equal(first[0], other[0]) and torch.equal(first[1], other[1]) for other in exact.values()
        )
        if "faiss flat" in results:
            theirs = torch.from_numpy(results["faiss flat"][1])
            found["of_faiss"] = float((theirs.sort(dim=1)[0] == first[1].sort(dim=1)[0]).float().mean())
    return found


if __name__ == "__main__":
    main()
