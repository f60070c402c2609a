"""One revision's share of a comparison: a process that does so many units of work when told to, and says the seconds.

`bench/compare` starts this file, the current checkout's, in the folder of a revision, whose own packages it imports.
So it uses few names of theirs: what a run itself starts with (Config, start, make_engine) and pipelines.decode.

A line in, "step 8" or "decode 64"; a line of JSON out: {"seconds": ...} or {"error": ...}. The first line out says
what is measured.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SIZE, BATCH, RESIDENT, NUM_CLASSES = 128, 32, 1024, 10


def main() -> None:
    """Serve the pipe until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it ends this process by closing the pipe
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not an answer
    try:
        with serving(Path(sys.argv[1]), int(sys.argv[2])) as (work, facts):
            print(json.dumps(facts), file=answers)
            for line in sys.stdin:
                what, count = line.split()
                print(json.dumps({"seconds": work[what](int(count))}), file=answers)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}".splitlines()[0]}), file=answers)


def imported(now: str, before: str) -> Any:
    """Return a module of the revision, by its name now or by the one before the rooms.

    The file is looked for, not tried: an editable install would find today's module for a revision that has none.
    """
    return importlib.import_module(now if Path(*now.split(".")).with_suffix(".py").is_file() else before)


@contextlib.contextmanager
def serving(photos: Path, threads: int) -> Iterator[tuple[dict[str, Callable[[int], float]], dict[str, Any]]]:
    """Give what does each kind of work and returns its seconds, and the facts about this revision."""
    import torch

    import fastcnn

    runtime = imported("fastcnn.system.device", "fastcnn.runtime")
    make_config = importlib.import_module("fastcnn.config").Config

    here = Path(str(fastcnn.__file__)).resolve().parents[1]
    assert here == Path.cwd().resolve(), f"fastcnn comes from {here}, not from the revision's folder"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = getattr(runtime, "torch_settings", None) or runtime.settings  # by its name now, or before
    with settings(device, threads=threads, deterministic=False):
        precision = runtime.pick_precision("auto", device, deterministic=False, strict=False)
        config = make_config(
            data=str(photos), image_size=SIZE, batch_size=BATCH, device=str(device), precision=precision
        )
        step, engine = training_step(config, device)
        facts = {"engine": engine, "precision": precision, "device": device.type, "torch": torch.__version__}
        yield {"step": step, "decode": decoding(photos, threads)}, facts


def training_step(config: Any, device: Any) -> tuple[Callable[[int], float], str]:
    """Return what does a number of training steps, as a run does them, and the name of its engine."""
    import torch

    pool = imported("fastcnn.network.kernels.cpu_max_pool", "fastcnn.kernels.pool")
    build = imported("fastcnn.runs.build", "fastcnn.session")

    if device.type == "cpu":
        with contextlib.suppress(pool.NoKernel):  # a run goes on without it, too
            pool.load()
    feed = imported("fastcnn.data.feeds", "fastcnn.feed").Feed(
        images=torch.randint(0, 256, (RESIDENT, SIZE, SIZE, 3), dtype=torch.uint8).to(device),
        labels=(torch.arange(RESIDENT) % NUM_CLASSES).to(device),
        permutation=torch.randperm(RESIDENT).to(device),
        cursor=torch.zeros(1, dtype=torch.int64, device=device),
    )
    state = build.start(config, Path(), tuple(map(str, range(NUM_CLASSES))), feed)
    engine = build.make_engine(state)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def run(count: int) -> float:
        wait()
        start = time.perf_counter()
        while count:
            portion = min(count, RESIDENT // BATCH)
            feed.cursor.zero_()
            state.step.number.zero_()  # the schedule is as long as a run, which this is not
            engine.run(portion)
            count -= portion
        wait()
        return time.perf_counter() - start

    return run, state.config.engine


def decoding(folder: Path, threads: int) -> Callable[[int], float]:
    """Return what decodes a number of the photos, as many times over as it takes."""
    import numpy as np

    import pipelines

    photos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    out = np.zeros((len(photos), SIZE, SIZE, 3), np.uint8)
    pipelines.decode(photos, SIZE, out, decoder="turbo", workers=threads)
    assert out.any((1, 2, 3)).all(), "some photos were not decoded"

    def run(count: int) -> float:
        start = time.perf_counter()
        while count:
            portion = min(count, len(photos))
            pipelines.decode(photos[:portion], SIZE, out[:portion], decoder="turbo", workers=threads)
            count -= portion
        return time.perf_counter() - start

    return run


if __name__ == "__main__":
    main()
