"""Process that works with one revision's code when it is told to, and reports the seconds.

`bench/compare` starts this file, the current checkout's, in the folder of a revision, whose own packages it imports.
It uses few of their names: the command line, what a run starts with (Config, start, make_engine) and
pipelines.decode, by their names now and those before the rooms.

    worker.py serve PHOTOS THREADS         # a line in, "step 8" or "decode 64"; a line of JSON out: {"seconds": ...}
    worker.py start PHOTOS THREADS         # `fastcnn train PHOTOS` until the first step is done: then a line, and exit

The first line of `serve` says what is measured; {"error": ...} says why it cannot be.
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
    """Serve the pipe until it ends, or start a run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it ends this process by closing the pipe
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not an answer
    how, photos, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])

    def answer(**facts: object) -> None:
        print(json.dumps(facts), file=answers)

    try:
        if how == "start":
            start_a_run(photos, threads, lambda: answer(done=True))
        with serving(photos, threads) as (work, facts):
            answer(**facts)
            for line in sys.stdin:
                what, count = line.split()
                answer(seconds=work[what](int(count)))
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}".splitlines()[0])


BUILD = "fastcnn.runs.build", "fastcnn.runs.state", "fastcnn.session"


def imported(*names: str) -> Any:
    """Return a module of the revision by the first of its names, newest first, that the revision has.

    The file is looked for, not tried: an editable install would find today's module for a revision that has none.
    """
    return importlib.import_module(next(name for name in names if Path(f"{name.replace('.', '/')}.py").is_file()))


def start_a_run(photos: Path, threads: int, done: Callable[[], None]) -> None:
    """Run `fastcnn train` until its first training step is done; then call `done` and end the process."""
    build = imported(*BUILD)  # before `fit`, which may import names from it
    make_engine = build.make_engine

    def make(*arguments: Any, **named: Any) -> Any:
        engine = make_engine(*arguments, **named)
        run = engine.run

        def run_once(num_steps: int) -> None:
            run(1)
            synchronize()
            done()
            os._exit(0)  # the rest of the run is not measured

        engine.run = run_once
        return engine

    build.make_engine = make
    run_dir = Path(os.environ["XDG_CACHE_HOME"]) / f"run-{os.getpid()}"  # goes with the comparison's folder
    options = ["--epochs", "1", "--image-size", SIZE, "--batch-size", BATCH, "--threads", threads]
    given = ["train", photos, *options, "--run-dir", run_dir, "--quiet", "--wandb", "disabled"]
    sys.argv = ["fastcnn", *map(str, given)]
    importlib.import_module("fastcnn.cli").main()
    raise RuntimeError("the run ended before a training step")


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def serving(photos: Path, threads: int) -> Iterator[tuple[dict[str, Callable[[int], float]], dict[str, Any]]]:
    """Give a function for each kind of work, which returns its seconds, and the facts about this revision."""
    import torch

    import fastcnn

    runtime = imported("fastcnn.system.device", "fastcnn.runtime")
    switches = imported("fastcnn.system.switches", "fastcnn.system.device", "fastcnn.runtime")
    torch_settings = getattr(switches, "torch_settings", None) or switches.settings

    here = Path(str(fastcnn.__file__)).resolve().parents[1]
    assert here == Path.cwd().resolve(), f"fastcnn comes from {here}, not from the revision's folder"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch_settings(device, threads=threads, deterministic=False):
        precision = runtime.pick_precision("auto", device, deterministic=False, strict=False)
        config = fastcnn.Config(
            data=str(photos), image_size=SIZE, batch_size=BATCH, device=str(device), precision=precision
        )
        step, engine = training_step(config, device)
        facts = {"engine": engine, "precision": precision, "device": device.type, "torch": torch.__version__}
        yield {"step": step, "decode": decoding(photos, threads)}, facts


def training_step(config: Any, device: Any) -> tuple[Callable[[int], float], str]:
    """Return a function that does a number of training steps, as a run does them, and the name of its engine."""
    import torch

    pool = imported("fastcnn.network.kernels.cpu_max_pool", "fastcnn.kernels.pool")
    build = imported(*BUILD)

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
    step_count = state.step.step_count if hasattr(state.step, "step_count") else state.step.number

    def run(count: int) -> float:
        synchronize()
        start = time.perf_counter()
        while count:
            portion = min(count, RESIDENT // BATCH)
            feed.cursor.zero_()
            step_count.zero_()  # the schedule is as long as a run, which this is not
            engine.run(portion)
            count -= portion
        synchronize()
        return time.perf_counter() - start

    return run, state.config.engine


def decoding(folder: Path, threads: int) -> Callable[[int], float]:
    """Return a function that decodes a number of the photos, as many times over as it takes."""
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
