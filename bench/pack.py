"""What trials at once are worth on a CPU, and what their photos take of memory.

python -m bench.pack PHOTOS [--rounds 3] [--pack 2] [--image-size 128] [--batch-size 32] [--filters 32]

Rounds of as many trials as are packed, in turn: one after another with every core, and at once with a share each. The
figure is all training photos over the wall time of the round: setting up, evaluation and checkpoints are in it.
Processes are started before.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from fastcnn.sweeps.trial_process import Epoch, Job, TrialProcess


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pack", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--filters", default="32")
    given = parser.parse_args()
    options = {
        "data": str(given.photos.resolve()),
        **{"epochs": 1, "limit_train_batches": given.steps, "report": False, "wandb": "disabled", "engine": "eager"},
        **{name: getattr(given, name) for name in ("image_size", "batch_size", "filters")},
    }
    count = given.pack * given.steps * given.batch_size
    with tempfile.TemporaryDirectory() as folder:
        slots: list[TrialProcess] = []
        looked: list[str] = []

        def look(epoch: Epoch) -> bool:
            if all(slot.busy for slot in slots):
                looked[:] = memory(slots)
            return False

        slots += [TrialProcess(look, print) for _ in range(given.pack)]
        jobs = Jobs(Path(folder), options)
        try:
            measure(slots, [jobs.make(given.pack) for _ in slots])  # imports, decodes, builds
            rates: dict[str, list[float]] = {"serial": [], "packed": []}
            for _ in range(given.rounds):
                seconds = sum(measure(slots[:1], [jobs.make(1)]) for _ in slots)
                rates["serial"].append(count / seconds)
                rates["packed"].append(count / measure(slots, [jobs.make(given.pack) for _ in slots]))
        finally:
            for slot in slots:
                slot.close()
    print("\n".join(looked))
    for name, values in rates.items():
        print(f"{name}  {statistics.median(values):,.0f} images/s ({min(values):,.0f} to {max(values):,.0f})")
    ratios = [packed / serial for packed, serial in zip(rates["packed"], rates["serial"], strict=True)]
    print(f"packed / serial  {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), n {len(ratios)}")


class Jobs:
    """Makes trials that are alike, each with a folder of its own."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.folder, self.options, self.number = folder, options, 0

    def make(self, slots: int) -> Job:
        """Return a trial that shares the cores with so many."""
        self.number += 1
        name = str(self.folder / str(self.number))
        return Job(options=self.options, run_dir=name, lock=f"{name}.lock", num_parallel=slots)


def measure(slots: list[TrialProcess], jobs: list[Job]) -> float:
    """Run a trial in each slot; return the seconds until the last has ended."""
    start = time.perf_counter()
    for slot, job in zip(slots, jobs, strict=True):
        slot.start(job)
    while busy := [slot for slot in slots if slot.busy]:
        wait([handle for slot in busy for handle in slot.handles], timeout=1)
        for slot in busy:
            ending = slot.poll()
            assert ending is None or ending.state == "done", ending
    return time.perf_counter() - start


def memory(slots: list[TrialProcess]) -> list[str]:
    """Return what the cache's pages take of each process: as if they were its own (RSS), and its share (PSS)."""
    lines = []
    for slot in slots:
        assert slot._process
        text = Path(f"/proc/{slot._process.pid}/smaps").read_text(encoding="utf-8")
        maps = re.findall(r"pixels\.bin\n.*?Rss: +(\d+) kB\nPss: +(\d+) kB\n", text, re.DOTALL)
        rss, pss = (sum(int(entry[i]) for entry in maps) / 1024 for i in (0, 1))
        lines.append(f"pages of the cache: {rss:,.1f} MiB in use, {pss:,.1f} MiB its share of what all use")
    return lines


if __name__ == "__main__":
    main()
