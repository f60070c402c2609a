"""`fit`: from a configuration to a trained model in a run folder. This module owns the training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml

from fastcnn import checkpoint, dataset, engines, index, runtime
from fastcnn.config import Config
from fastcnn.console import Console
from fastcnn.dataset import Dataset
from fastcnn.errors import DataError, FastCNNError, UsageError, fall_back
from fastcnn.evaluate import evaluate
from fastcnn.kernels import pool
from fastcnn.loader import LOADERS, Feed
from fastcnn.metrics import Score, Stopwatch
from fastcnn.model import SmallCNN
from fastcnn.optim import Adam, FlatParameters
from fastcnn.step import Normalise, TrainingStep
from fastcnn.tracker import TRACKERS, Tracker

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Interrupted(FastCNNError):
    """The run was told to stop, and has saved where it was."""

    def __init__(self, signum: int, run_dir: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; saved in {run_dir / 'last.pt'}")
        self.exit_code = 128 + signum


@dataclass(frozen=True)
class Result:
    """What a run left."""

    run_dir: Path
    metrics: list[dict[str, float]]
    """A row an epoch, as in metrics.csv."""
    summary: dict[str, Any]
    """What result.json holds."""


@dataclass
class Session:
    """What the training loop changes."""

    config: Config
    run_dir: Path
    classes: tuple[str, ...]
    model: SmallCNN
    optimizer: Adam
    step: TrainingStep
    normalise: Normalise
    epoch: int = 0
    """Epochs finished."""
    best: dict[str, float] = dataclasses.field(default_factory=dict)
    """Figures of the best epoch so far."""

    def save(self, name: str) -> None:
        """Write a checkpoint into the run folder."""
        state = {
            "config": self.config.to_dict(),
            "classes": list(self.classes),
            "network": self.model.options,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "cursor": int(self.step.feed.cursor),
            "sums": self.step.sums.values,
            "best": self.best,
            "rng": torch.get_rng_state(),
        }
        checkpoint.save(self.run_dir / name, state)


def fit(
    config: Config,
    *,
    run_dir: str | Path | None = None,
    console: Console | None = None,
    import_seconds: float = 0.0,
) -> Result:
    """Train as configured and return the result; everything else is in the run folder.

    Args:
        config: the run.
        run_dir: where to; None takes the next free name under `runs/`. A folder with files in it is refused.
        console: where progress is shown; None shows nothing.
        import_seconds: what importing cost before this call, for the time table.

    Raises DataError where the photos cannot be used, Interrupted on SIGINT and SIGTERM after saving `last.pt`, and
    FastCNNError for whatever else the user can mend.
    """
    console = console or Console(quiet=True)
    watch = Stopwatch()
    watch.seconds["import"] = import_seconds
    config = _resolve(config)
    device = torch.device(config.device)
    with runtime.settings(device, threads=config.threads, deterministic=config.deterministic):
        with console.progress("decoding", "photos") as progress:
            data = dataset.prepare(
                config.data,
                image_size=config.image_size,
                decoder=config.decoder,
                gpu=device.index if device.type == "cuda" else None,
                workers=config.workers,
                cache_dir=config.cache_dir,
                val_fraction=config.val_fraction,
                seed=config.seed,
                split=config.split,
                max_bad=config.max_bad,
                strict=config.strict,
                progress=lambda done, total: progress(done, total, ""),
                note=console.line,
                stopwatch=watch,
            )
        config = dataclasses.replace(config, decoder=data.decoder)
        with watch.stage("compile"):
            _load_kernels(device, strict=config.strict)
        _report_cache(console, data)
        with watch.stage("upload"):
            feeds = {
                split: LOADERS[config.loader](data.cache, data.photos(split), data.index.labels, device)
                for split in ("train", "val", "test")
            }
        if len(feeds["train"]) < config.batch_size:
            raise DataError(
                f"{len(feeds['train'])} training photos do not fill one batch of {config.batch_size}: "
                "lower --batch-size or add photos"
            )
        folder = _make_run_dir(run_dir, config)
        session = _start(config, folder, data.index.classes, feeds["train"], device)
        _write_inputs(folder, config, data)
        console.line(
            f"{len(feeds['train']):,} train, {len(feeds['val']):,} val, {len(feeds['test']):,} test photos; "
            f"{config.engine} engine, {config.precision}, {device}; run folder {folder}"
        )
        trackers = [make(folder, console, config.epochs) for make in TRACKERS.values()]
        with _signals() as stop:
            rows = _train(session, feeds, watch, trackers, console, stop)
        summary = _finish(session, data, feeds, rows, watch, device)
    _report(console, summary, folder)
    return Result(folder, rows, summary)


def _resolve(config: Config) -> Config:
    """Return the configuration with every "auto" but the decoder replaced by what it is on this machine."""
    if not config.data:
        raise UsageError("which photos? fastcnn train DATA, where DATA is a folder of photos")
    device = runtime.pick_device(config.device)
    return dataclasses.replace(
        config,
        data=str(Path(config.data).resolve()),
        device=str(device),
        precision=runtime.pick_precision(
            config.precision, device, deterministic=config.deterministic, strict=config.strict
        ),
        loader="resident" if config.loader == "auto" else config.loader,
        engine=engines.choose(config.engine),
        threads=config.threads or runtime.num_cores(),
    )


def _load_kernels(device: torch.device, *, strict: bool) -> None:
    if device.type == "cpu" and sys.platform == "linux":
        try:
            pool.load()
        except pool.NoKernel as error:
            fall_back(f"training without the fast pooling kernel: {error}", strict=strict)


def _start(config: Config, folder: Path, classes: tuple[str, ...], feed: Feed, device: torch.device) -> Session:
    torch.manual_seed(config.seed)  # on the CPU first: the same initial weights on every device
    model = SmallCNN(
        len(classes),
        filters=config.filters,
        kernel_size=config.kernel_size,
        activation=config.activation,
        batch_norm=config.batch_norm,
        dense_neurons=config.dense_neurons,
        dropout=config.dropout,
        image_size=config.image_size,
    ).to(device)
    parameters = FlatParameters(model)
    optimizer = Adam(parameters, config.lr)
    normalise = Normalise(config.mean, config.std, DTYPES[config.precision], device)
    step = TrainingStep(model, parameters, optimizer, feed, normalise, batch_size=config.batch_size)
    return Session(config, folder, classes, model, optimizer, step, normalise)


def _train(
    session: Session,
    feeds: dict[str, Feed],
    watch: Stopwatch,
    trackers: list[Tracker],
    console: Console,
    stop: list[int],
) -> list[dict[str, float]]:
    """Run the epochs and return a row each. `stop` holds the signal that asks the run to end, once one came."""
    config, step = session.config, session.step
    engine = engines.ENGINES[config.engine](step)
    num_steps = len(feeds["train"]) // config.batch_size  # the permutation's tail is dropped
    rows: list[dict[str, float]] = []
    for epoch in range(1, config.epochs + 1):
        start = time.perf_counter()
        session.model.train()
        with watch.stage("train"), console.progress(f"epoch {epoch}/{config.epochs}", "steps") as progress:
            step.feed.start_epoch(config.seed, epoch)
            step.sums.reset()
            for chunk in _chunks(num_steps):
                engine.run(len(chunk))
                done = chunk.stop
                progress(done, num_steps, f"{done * config.batch_size / (time.perf_counter() - start):,.0f} images/s")
                if stop:
                    session.save("last.pt")
                    raise Interrupted(stop[0], session.run_dir)
            train = step.sums.read()  # the epoch's one synchronisation
            train_seconds = time.perf_counter() - start
        with watch.stage("eval"):
            val = evaluate(session.model, feeds["val"], session.normalise).score
        session.epoch = epoch
        row = {
            "epoch": epoch,
            "seconds": time.perf_counter() - start,
            "train/loss": train.loss,
            "train/accuracy": train.accuracy,
            "val/loss": val.loss,
            "val/accuracy": val.accuracy,
            "lr": float(session.optimizer.lr),
            "images_per_second": num_steps * config.batch_size / train_seconds,
        }
        rows.append(row)
        is_best = not session.best or _rank(row) > _rank(session.best)
        if is_best:
            session.best = row
        with watch.stage("checkpoint"):
            session.save("last.pt")
            if is_best:
                session.save("best.pt")
        for tracker in trackers:
            tracker.epoch(row)
    return rows


def _rank(row: dict[str, float]) -> tuple[float, float]:
    """Order epochs: the highest validation accuracy, ties by loss; a loss that is no number is the worst."""
    loss = row["val/loss"]
    return row["val/accuracy"], -loss if loss == loss else float("-inf")


def _chunks(num_steps: int) -> Iterator[range]:
    """Cut an epoch into at most 50 runs of the engine: often enough for a progress bar and a signal."""
    size = max(1, num_steps // 50)
    return (range(start, min(start + size, num_steps)) for start in range(0, num_steps, size))


def _finish(
    session: Session,
    data: Dataset,
    feeds: dict[str, Feed],
    rows: list[dict[str, float]],
    watch: Stopwatch,
    device: torch.device,
) -> dict[str, Any]:
    """Look at the test set once, with the best weights; write and return what result.json holds."""
    config, test = session.config, Score(loss=float("nan"), accuracy=float("nan"), count=0)
    if len(feeds["test"]):
        with watch.stage("eval"):
            best = checkpoint.load(session.run_dir / "best.pt", device)
            session.model.load_state_dict(best["model"])
            test = evaluate(session.model, feeds["test"], session.normalise).score
    steady = rows[1:] or rows
    stages = {name: watch.seconds.get(name, 0.0) for name in STAGES}
    summary = {
        "engine": config.engine,
        "decoder": config.decoder,
        "loader": config.loader,
        "precision": config.precision,
        "device": config.device,
        "best_epoch": int(session.best["epoch"]),
        "num_train": len(feeds["train"]),
        "num_val": len(feeds["val"]),
        "num_test": len(feeds["test"]),
        "num_bad": len(data.bad),
        "num_decoded": data.cache.num_decoded,
        "val_accuracy": session.best["val/accuracy"],
        "val_loss": session.best["val/loss"],
        "test_accuracy": test.accuracy if test.count else None,
        "test_loss": test.loss if test.count else None,
        # Steady state: the mean over the epochs after the first, by time.
        "images_per_second": len(steady) / sum(1 / row["images_per_second"] for row in steady),
        "seconds": {**stages, "total": watch.total() + watch.seconds["import"]},
        "peak_memory_bytes": runtime.peak_memory_bytes(device),
        "versions": runtime.versions(),
        "hardware": runtime.describe(device),
    }
    (session.run_dir / "result.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


STAGES = ("import", "scan", "decode", "upload", "compile", "train", "eval", "checkpoint", "export")


def _make_run_dir(run_dir: str | Path | None, config: Config) -> Path:
    """Make and return the run folder: the one asked for, or the next free name under `runs/`."""
    try:
        if run_dir is not None:
            folder = Path(run_dir)
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise FastCNNError(f"the run folder {folder} is not empty: choose another with --run-dir")
            return folder
        name = Path(config.data).name or "run"
        for number in itertools.count(1):
            folder = checkpoint.RUNS / (name if number == 1 else f"{name}-{number}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir(parents=True)
                return folder
    except OSError as error:
        raise FastCNNError(f"cannot make the run folder: {error}; choose another with --run-dir") from None
    raise AssertionError


def _write_inputs(folder: Path, config: Config, data: Dataset) -> None:
    text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
    (folder / "config.yaml").write_text(text, encoding="utf-8", errors="surrogateescape")
    index.write_split(folder / "split.csv", data.index, data.splits)
    dataset.write_bad(folder / "bad_images.csv", data.bad)


def _report_cache(console: Console, data: Dataset) -> None:
    cache = data.cache
    if cache.num_decoded:
        rate = cache.num_decoded / cache.decode_seconds
        console.line(f"decoded {cache.num_decoded:,} photos with {data.decoder}, {rate:,.0f} photos/s")
    else:
        console.line("every photo is in the cache: nothing to decode")


def _report(console: Console, summary: dict[str, Any], folder: Path) -> None:
    console.line(
        f"best epoch {summary['best_epoch']}: val accuracy {summary['val_accuracy']:.4f} loss {summary['val_loss']:.4f}"
        + ("" if summary["test_accuracy"] is None else f"; test accuracy {summary['test_accuracy']:.4f}")
    )
    console.line(
        f"{summary['images_per_second']:,.0f} images/s, {summary['seconds']['total']:.1f} s in all; results in {folder}"
    )


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Yield a list that the first SIGINT or SIGTERM is put into; a second SIGINT ends the process at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def receive(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    before = {signum: signal.signal(signum, receive) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
