"""What the memory of a device does without a kernel of ours: ``python -m bench.device --json F``.

Copy bandwidth, which every floor is taken from; how fast a buffer is read again, with other memory
streamed in between, which says how much of it the cache has kept; and what a launch costs. Plain
torch operations only. On a CPU it runs, and means nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MB = 2**20
COPIED_MB = (64, 256, 1024, 2048)
READ_MB = (2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 64, 96)
STREAMED_MB = (0, 16, 32, 128)
LAUNCHES = 500
ROUNDS = 9
_COLUMNS = 4096  # float32, so that a row is summed by one block


class Queue:
    """Times work on a device; on a CPU, the calls."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_cuda = device.type == "cuda"
        # A millisecond and more to do, so that the host is ahead of what is timed.
        self._busy = torch.empty(1024 * MB if self.on_cuda else 0, dtype=torch.uint8, device=device)

    def wait(self) -> None:
        """Until all is done."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def ms(self, work: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
        """Median of the work alone, each time behind what comes before it."""
        times = []
        for _ in range(ROUNDS):
            for _ in range(3):
                self._busy.zero_()
            times.append(self._once(work, before))
        return statistics.median(times)

    def _once(self, work: Callable[[], object], before: Callable[[], object]) -> float:
        if not self.on_cuda:
            before()
            started = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - started)
        first = torch.cuda.Event(enable_timing=True)
        last = torch.cuda.Event(enable_timing=True)
        before()
        first.record()
        work()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last))


def copies(queue: Queue, sizes_mb: tuple[int, ...]) -> list[dict[str, float]]:
    """Bytes read and written a second, by size."""
    found = []
    for size in sizes_mb:
        source = torch.ones(size * MB // 4, device=queue.device)
        target = torch.empty_like(source)
        ms = queue.ms(lambda source=source, target=target: target.copy_(source))
        found.append({"mb": size, "ms": ms, "gb_per_s": 2 * source.nbytes / ms / 1e6})
    return found


def rereads(
    queue: Queue, read_mb: tuple[int, ...], streamed_mb: tuple[int, ...]
) -> list[dict[str, float]]:
    """Bytes a second of reading what was just read, after so much else was read and written."""
    stream = torch.ones(max(*streamed_mb, 1) * MB // 4, device=queue.device)
    found = []
    for size in read_mb:
        values = torch.ones(size * MB // 4 // _COLUMNS, _COLUMNS, device=queue.device)
        sums = torch.empty(values.shape[0], device=queue.device)
        for streamed in streamed_mb:
            between = stream[: streamed * MB // 8]  # read and written: twice its bytes

            def read(values: Tensor = values, sums: Tensor = sums) -> None:
                torch.sum(values, 1, out=sums)

            def read_and_stream(read: Callable[[], None] = read, other: Tensor = between) -> None:
                read()
                other.add_(1)

            ms = queue.ms(read, read_and_stream)
            entry = {"mb": size, "streamed_mb": streamed, "ms": ms}
            found.append({**entry, "gb_per_s": values.nbytes / ms / 1e6})
    return found


def launches(queue: Queue, count: int) -> dict[str, float]:
    """Microseconds that a launch takes of the host and of the device, and there and back."""
    cell = torch.zeros(1, device=queue.device)

    def many() -> None:
        for _ in range(count):
            cell.add_(1)

    many()
    queue.wait()
    started = time.perf_counter()
    many()
    on_host = time.perf_counter() - started
    queue.wait()
    started = time.perf_counter()
    for _ in range(count):
        cell.add_(1)
        queue.wait()
    there_and_back = time.perf_counter() - started
    replay: Callable[[], object] = many
    if queue.on_cuda:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            many()
        replay = graph.replay
        replay()
    in_graph = queue.ms(replay) / 1e3
    us = {"host": on_host, "there_and_back": there_and_back, "device_in_graph": in_graph}
    return {f"{name}_us": 1e6 * seconds / count for name, seconds in us.items()}


def facts(device: torch.device) -> dict[str, Any]:
    """What the device says of itself."""
    if device.type != "cuda":
        return {"name": str(device)}
    found = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    names = ("name", "multi_processor_count", "L2_cache_size", "major", "minor")
    return {name: getattr(found, name, None) for name in names} | {"free": free, "total": total}


def main() -> None:
    """Measure, write the record and say the most important of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="a little of each")
    args = parser.parse_args()
    device = torch.device(args.device)
    queue = Queue(device)
    record: dict[str, Any] = {"schema": 1, "torch": torch.__version__, "device": facts(device)}

    def keep(**found: Any) -> None:
        record.update(found)
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    copied = copies(queue, (1,) if args.dry_run else COPIED_MB)
    fastest = max(entry["gb_per_s"] for entry in copied)
    keep(copies=copied, copy_gb_per_s=fastest)
    keep(launch=launches(queue, 3 if args.dry_run else LAUNCHES))
    read_mb, streamed_mb = ((1,), (0, 1)) if args.dry_run else (READ_MB, STREAMED_MB)
    keep(rereads=rereads(queue, read_mb, streamed_mb))
    print(
        f"copy {fastest:.0f} GB/s; "
        + ", ".join(f"{k} {v:.2f}" for k, v in record["launch"].items())
    )
    for size in read_mb:
        row = [entry for entry in record["rereads"] if entry["mb"] == size]
        cells = [f"{e['gb_per_s']:6.0f} after {e['streamed_mb']} MB" for e in row]
        print(f"read again {size:3} MB, GB/s: " + ", ".join(cells))


if __name__ == "__main__":
    main()
