"""Latency and throughput of one opened model that threads of an application share.

    python benchmarks/load.py exported --item picture.png
    python benchmarks/load.py exported --clients 1,2,4,8,16 --threads 1,2 --requests 2000

Every client asks for one input after the other, as workers of a server do. Each line is one number
of clients and of onnxruntime's threads: requests per second of all clients together, and
milliseconds per request, waiting for other clients included. Settings are measured in turns, the
best of several rounds counts, and every answer is compared with that of one client.
"""

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np

import epmq_deploy as epmq
from epmq_deploy.cpu import usable_cores


def items(given: list[str], family_is_text: bool) -> list[Any]:
    """Return what to ask: the items given, or random images or texts of several lengths."""
    if given:
        return list(given)
    rng = np.random.default_rng(0)
    if family_is_text:
        return [" ".join(["word"] * int(length)) for length in rng.integers(4, 40, 16)]
    return list(rng.integers(0, 256, (16, 224, 224, 3), dtype=np.uint8))


def labels(answer: dict[str, Any]) -> dict[str, str | None]:
    """Return the label of each task."""
    return {task: found.label for task, found in answer.items()}


def measure(model: Any, asked: list[Any], clients: int, requests: int) -> dict[str, float]:
    """Let so many clients ask at once.

    Args:
        model: opened by ``load``.
        asked: the inputs.
        clients: threads that ask.
        requests: of all clients together.

    Returns:
        Requests per second; 50th, 95th and 99th percentile of milliseconds per request; answers
        that differ from those of one client.
    """
    expected = [labels(model(item)) for item in asked]
    each = max(1, requests // clients)
    start = Barrier(clients + 1)

    def client(number: int) -> tuple[list[float], int]:
        times, different = [], 0
        start.wait()
        for turn in range(each):
            index = (number + turn) % len(asked)
            began = time.perf_counter()
            answer = model(asked[index])
            times.append(time.perf_counter() - began)
            different += labels(answer) != expected[index]
        return times, different

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client, number) for number in range(clients)]
        start.wait()
        began = time.perf_counter()
        outcomes = [future.result() for future in running]
        seconds = time.perf_counter() - began
    times = 1000 * np.concatenate([times for times, _ in outcomes])
    p50, p95, p99 = np.percentile(times, (50, 95, 99))
    return {
        "per_second": clients * each / seconds,
        "p50_ms": float(p50),
        "p95_ms": float(p95),
        "p99_ms": float(p99),
        "different": sum(different for _, different in outcomes),
    }


def main() -> None:
    """Measure, print a table, then JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("exported", type=Path)
    parser.add_argument("--format", default=None)
    parser.add_argument("--item", action="append", default=[])
    parser.add_argument("--text", action="store_true", help="ask texts instead of images")
    parser.add_argument("--clients", default="1,2,4,8,16")
    parser.add_argument("--threads", default=str(usable_cores() or 1))
    parser.add_argument("--requests", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    asked = items(options.item, options.text)
    models = {
        threads: epmq.load(options.exported, format=options.format, threads=threads, provider="cpu")
        for threads in map(int, options.threads.split(","))
    }
    settings = [(t, c) for t in models for c in map(int, options.clients.split(","))]
    best: dict[tuple[int, int], dict[str, float]] = {}
    for _ in range(options.rounds):
        for threads, clients in settings:
            found = measure(models[threads], asked, clients, options.requests)
            earlier = best.get((threads, clients))
            if earlier is None or found["per_second"] > earlier["per_second"]:
                best[threads, clients] = found
    print("| threads | clients | requests/s | p50 ms | p95 ms | p99 ms | different answers |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    for (threads, clients), row in best.items():
        figures = [f"{row[name]:.1f}" for name in ("per_second", "p50_ms", "p95_ms", "p99_ms")]
        print(f"| {threads} | {clients} | {' | '.join(figures)} | {row['different']:.0f} |")
    rows = [{"threads": t, "clients": c, **row} for (t, c), row in best.items()]
    json.dump({"cores": usable_cores(), "rows": rows}, sys.stdout)
    print()


if __name__ == "__main__":
    main()
