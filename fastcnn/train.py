"""`fit`: from a configuration to a trained model in a run folder. This module owns the training loop."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from fastcnn import checkpoint, dataset, index, runs, runtime, signals
from fastcnn import session as sessions
from fastcnn import tracker as tracking
from fastcnn.config import Config
from fastcnn.console import Console
from fastcnn.dataset import Dataset
from fastcnn.engines import Engine
from fastcnn.errors import DataError, FastCNNError, UsageError, fall_back
from fastcnn.evaluate import Evaluator
from fastcnn.kernels import pool
from fastcnn.loader import LOADERS, Feed
from fastcnn.metrics import Live, Outcome, Score, Stopwatch
from fastcnn.session import Session
from fastcnn.step import TrainingStep
from fastcnn.tracker import Run, Tracker


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
    tf32 = config.precision == "tf32"
    with (
        runs.folder(run_dir, Path(config.data).name or "run") as folder,
        runtime.settings(device, threads=config.threads, deterministic=config.deterministic, tf32=tf32),
    ):
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
        session = sessions.start(config, folder, data.index.classes, feeds["train"])
        with watch.stage("compile"):
            engine = sessions.make_engine(session)
            evaluator = sessions.make_evaluator(session, feeds["val"])
        if session.why:
            console.line(f"engine {session.config.engine}: {session.why}")
        _write_inputs(session, data)
        console.line(
            f"{len(feeds['train']):,} train, {len(feeds['val']):,} val, {len(feeds['test']):,} test photos; "
            f"{session.config.engine} engine, {config.precision}, {device}; run folder {session.run_dir}"
        )
        facts = {"hardware": runtime.describe(device), "versions": runtime.versions()}
        run = Run(
            run_dir=session.run_dir,
            console=console,
            num_epochs=config.epochs,
            config={**session.config.to_dict(), **facts},
        )
        with tracking.opened(run) as trackers:
            with signals.received() as stop:
                rows = _train(session, engine, evaluator, watch, trackers, console, stop)
            summary = _finish(session, data, feeds, rows, watch)
            exported, failure = _export(session, console, watch)
            summary["seconds"] |= {"export": watch.seconds.get("export", 0.0), "total": _total(watch)}
            outcome = Outcome(summary=summary, classes=session.classes, exported=exported)
            summary |= tracking.finish(trackers, outcome)
        _write_result(session.run_dir, summary)
    _report(console, summary, session.run_dir)
    if failure:
        raise failure
    return Result(session.run_dir, rows, summary)


def _resolve(config: Config) -> Config:
    """Return the configuration with every "auto" but decoder and engine replaced by what it is on this machine."""
    if not config.data:
        raise UsageError("which photos? fastcnn train DATA, where DATA is a folder of photos")
    device = runtime.pick_device(config.device)
    return dataclasses.replace(
        config,
        data=str(Path(config.data).resolve()),
        split=config.split and str(Path(config.split).resolve()),
        cache_dir=config.cache_dir and str(Path(config.cache_dir).resolve()),
        device=str(device),
        precision=runtime.pick_precision(
            config.precision, device, deterministic=config.deterministic, strict=config.strict
        ),
        loader="resident" if config.loader == "auto" else config.loader,
        threads=config.threads or runtime.num_cores(),
    )


def _load_kernels(device: torch.device, *, strict: bool) -> None:
    if device.type == "cpu" and sys.platform == "linux":
        try:
            pool.load()
        except pool.NoKernel as error:
            fall_back(f"training without the fast pooling kernel: {error}", strict=strict)


def _train(
    session: Session,
    engine: Engine,
    evaluator: Evaluator,
    watch: Stopwatch,
    trackers: list[Tracker],
    console: Console,
    stop: list[int],
) -> list[dict[str, float]]:
    """Run the epochs and return a row each. `stop` holds the signal that asks the run to end, once one came."""
    config, step = session.config, session.step
    rows: list[dict[str, float]] = []
    for epoch in range(1, config.epochs + 1):
        start = time.perf_counter()
        step.parameters.compute.train()
        with watch.stage("train"), console.progress(f"epoch {epoch}/{config.epochs}", "steps") as progress:
            step.feed.start_epoch(config.seed, epoch)
            step.sums.reset()
            for done, live in _run_epoch(step, engine):
                rate = live.count / (time.perf_counter() - start)
                progress(done, step.num_steps, f"loss {live.loss:.4f}  {rate:,.0f} images/s")
                if stop:
                    session.save("last.pt")
                    raise Interrupted(stop[0], session.run_dir)
            train = step.sums.read()  # the epoch's one synchronisation
            train_seconds = time.perf_counter() - start
        _check_finite(session)
        with watch.stage("eval"), session.averaged():
            val = evaluator().score
        session.epoch = epoch
        row = {
            "epoch": epoch,
            "seconds": time.perf_counter() - start,
            "train/loss": train.loss,
            "train/accuracy": train.accuracy,
            "val/loss": val.loss,
            "val/accuracy": val.accuracy,
            "lr": float(step.optimizer.lr),
            "images_per_second": train.count / train_seconds,
        }
        rows.append(row)
        is_best = not session.best or _rank(row) > _rank(session.best)
        if is_best:
            session.best = row
        with watch.stage("checkpoint"):
            session.save("last.pt")
            if is_best:
                with session.averaged():
                    session.save("best.pt")
        for tracker in trackers:
            tracker.epoch(row)
    return rows


def _run_epoch(step: TrainingStep, engine: Engine) -> Iterator[tuple[int, Score]]:
    """Run an epoch's steps in portions of about a tenth of a second; yield the steps queued and the score so far."""
    done, portion, live = 0, 1, Live(step.sums)
    while done < step.num_steps:
        start = time.perf_counter()
        portion = min(portion, step.num_steps - done)
        engine.run(portion)
        live.mark()
        done += portion
        yield done, live.score
        if time.perf_counter() - start < 0.1:
            portion *= 2


def _check_finite(session: Session) -> None:
    step = session.step
    if not step.frozen:
        return
    raise FastCNNError(
        f"the loss of step {int(step.optimizer.num_updates) + 1} is not a finite number (learning rate "
        f"{float(step.optimizer.lr):g}): nothing was updated from there on; "
        "try a lower --lr, --clip-norm 1 or --precision fp32"
    )


def _rank(row: dict[str, float]) -> tuple[float, float]:
    """Order epochs: the highest validation accuracy, ties by loss; a loss that is no number is the worst."""
    loss = row["val/loss"]
    return row["val/accuracy"], -loss if loss == loss else float("-inf")


def _finish(
    session: Session, data: Dataset, feeds: dict[str, Feed], rows: list[dict[str, float]], watch: Stopwatch
) -> dict[str, Any]:
    """Look at the test set once, with the best weights; write and return what result.json holds."""
    config, step, test = session.config, session.step, Score(loss=float("nan"), accuracy=float("nan"), count=0)
    device = step.feed.images.device
    if len(feeds["test"]):
        with watch.stage("eval"):
            session.model.load_state_dict(checkpoint.load(session.run_dir / "best.pt", device)["model"])
            step.parameters.refresh()
            test = sessions.make_evaluator(session, feeds["test"])().score
    steady = rows[1:] or rows
    stages = {name: watch.seconds.get(name, 0.0) for name in STAGES}
    summary = {
        "engine": config.engine,
        "engine_reason": session.why,
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
        "seconds": {**stages, "total": _total(watch)},
        "peak_memory_bytes": runtime.peak_memory_bytes(device),
        "versions": runtime.versions(),
        "hardware": runtime.describe(device),
    }
    _write_result(session.run_dir, summary)
    return summary


def _export(session: Session, console: Console, watch: Stopwatch) -> tuple[list[Path], FastCNNError | None]:
    """Export as configured; return the files and, where one cannot be made, why: the run is finished all the same."""
    exported: list[Path] = []
    if not session.config.export:
        return exported, None
    from fastcnn.export import export_run

    with watch.stage("export"):
        for name in session.config.export:
            try:
                exported.append(export_run(session.run_dir, format=name))
            except FastCNNError as error:
                return exported, error
            console.line(f"exported {exported[-1]}: the same probabilities as the trained model")
    return exported, None


def _total(watch: Stopwatch) -> float:
    return watch.total() + watch.seconds["import"]


def _write_result(folder: Path, summary: dict[str, Any]) -> None:
    partial = folder / ".partial-result.json"
    partial.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / "result.json")


STAGES = ("import", "scan", "decode", "upload", "compile", "train", "eval", "checkpoint", "export")


def _write_inputs(session: Session, data: Dataset) -> None:
    folder, config = session.run_dir, session.config
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
