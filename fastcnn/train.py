"""`fit`: from a configuration to a trained model in a run folder. This module owns the training loop."""

from __future__ import annotations

import contextlib
import dataclasses
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
from fastcnn.config import Config, field_types, option_name, resolve
from fastcnn.console import Console
from fastcnn.dataset import Dataset
from fastcnn.engines import Engine
from fastcnn.errors import DataError, FastCNNError, UsageError, fall_back
from fastcnn.evaluate import BATCH_SIZE, Evaluator
from fastcnn.finish import finish
from fastcnn.kernels import pool
from fastcnn.loader import LOADERS, Options
from fastcnn.metrics import Live, Score, Stopwatch
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
    resume: str | Path | None = None,
    console: Console | None = None,
    import_seconds: float = 0.0,
) -> Result:
    """Train as configured and return the result; everything else is in the run folder.

    Args:
        config: the run.
        run_dir: where to; None takes the next free name under `runs/`. A folder with files in it is refused.
        resume: the run to go on with from its `last.pt`, in its folder; `config` is then that of `resumed_config`.
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
    name = Path(config.data).name or "run"
    with (
        contextlib.nullcontext(runs.find(resume)) if resume else runs.folder(run_dir, name) as folder,
        runtime.settings(device, threads=config.threads, deterministic=config.deterministic, tf32=tf32),
    ):
        with console.progress("decoding", "photos") as progress:
            data = dataset.prepare(
                config.data,
                image_size=config.decoded_size,
                decoder=config.decoder,
                gpu=device.index if device.type == "cuda" else None,
                workers=config.workers,
                cache_dir=config.cache_dir,
                loader=config.loader,
                memory_limit=config.memory_limit,
                val_fraction=config.val_fraction,
                seed=config.seed,
                split=folder / "split.csv" if resume else config.split,
                max_bad=config.max_bad,
                max_pixels=config.max_pixels,
                strict=config.strict,
                progress=lambda done, total: progress(done, total, ""),
                note=console.line,
                stopwatch=watch,
            )
        config = dataclasses.replace(config, decoder=data.decoder, loader=data.loader)
        with watch.stage("compile"):
            _load_kernels(device, strict=config.strict)
        _report_cache(console, data)
        with watch.stage("upload"):
            feeds = {
                split: LOADERS[config.loader](
                    data.index, data.cache, data.photos(split), _options(config, device, split)
                )
                for split in ("train", "val", "test")
            }
        if len(feeds["train"]) < config.batch_size:
            raise DataError(
                f"{len(feeds['train'])} training photos do not fill one batch of {config.batch_size}: "
                "lower --batch-size or add photos"
            )
        session = sessions.start(
            config, folder, data.index.classes, feeds["train"], data.index.labels[data.photos("train")]
        )
        if resume:
            _restore(session, console)
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
        run = Run(
            run_dir=session.run_dir,
            console=console,
            num_epochs=config.epochs,
            config={
                **session.config.to_dict(),
                "hardware": runtime.describe(device),
                "versions": runtime.versions(),
            },
            rows=tuple(session.rows),
        )
        with tracking.opened(run) as trackers:
            with signals.received() as stop:
                _train(session, engine, evaluator, watch, trackers, console, stop)
            summary = finish(session, data, feeds, watch, trackers, console)
    _report(console, summary, session.run_dir)
    if summary["export_error"]:
        raise FastCNNError(summary["export_error"])
    return Result(session.run_dir, session.rows, summary)


RESUMABLE = ("epochs", "device", "wandb")  # what may change when a run goes on


def resumed_config(run: str | Path, changes: dict[str, Any]) -> Config:
    """Return the configuration to go on with a run by: its own, with other `epochs` or another `device`.

    Raises UsageError for any other change, FastCNNError where there is no such run or no `last.pt` in it.
    """
    refused = ["DATA" if name == "data" else option_name(name) for name in changes if name not in RESUMABLE]
    if refused:
        raise UsageError(
            f"--resume goes on as before: {', '.join(refused)} cannot change, "
            f"only {', '.join(option_name(name) for name in RESUMABLE)}"
        )
    folder = runs.find(run)
    state = checkpoint.load(folder / "last.pt")
    saved = {name: value for name, value in state["config"].items() if name in field_types()}
    config = resolve(saved, changes)
    if config.epochs <= state["epoch"] and (folder / "result.json").is_file():
        raise UsageError(f"--resume: {run} has its {state['epoch']} epochs: give more with --epochs")
    return config


def _restore(session: Session, console: Console) -> None:
    state = checkpoint.load(session.run_dir / "last.pt", session.step.feed.images.device)
    if tuple(state["classes"]) != session.classes:
        raise DataError(f"{session.run_dir} was trained on other classes than there are now: begin a new run")
    session.restore(state)
    done = _steps_done(session.step)
    console.line(f"going on after epoch {session.epoch}" + (f" and {done} steps" if done else ""))


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
        init_from=config.init_from
        and str(Path(config.init_from).resolve() if Path(config.init_from).exists() else config.init_from),
        device=str(device),
        precision=runtime.pick_precision(
            config.precision, device, deterministic=config.deterministic, strict=config.strict
        ),
        threads=config.threads or runtime.num_cores(),
    )


def _options(config: Config, device: torch.device, split: str) -> Options:
    return Options(
        device=device,
        batch_size=config.batch_size if split == "train" else BATCH_SIZE,
        decoder=config.decoder,
        workers=config.workers,
        crop_scale=dict(config.augmentations).get("crop"),
        max_pixels=config.max_pixels,
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
) -> None:
    """Run the epochs that are left. `stop` holds the signal that asks the run to end, once one came."""
    config, step = session.config, session.step
    while session.epoch < config.epochs and not _is_stale(session, console):
        epoch, start = session.epoch + 1, time.perf_counter()
        done = _steps_done(step)
        step.parameters.compute.train()
        with (
            watch.stage("train"),
            step.feed.start_epoch(config.seed, epoch, done * config.batch_size, session.chances),
            console.progress(f"epoch {epoch}/{config.epochs}", "steps") as progress,
        ):
            if not done:
                step.sums.reset()
            for queued, live in _run_epoch(step, engine, done):
                rate = (live.count - done * config.batch_size) / (time.perf_counter() - start)
                progress(queued, step.num_steps, f"loss {live.loss:.4f}  {max(rate, 0):,.0f} images/s")
                if stop and queued < step.num_steps:  # an epoch whose steps are done is finished first
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
            "images_per_second": (train.count - done * config.batch_size) / train_seconds,
        }
        session.rows.append(row)
        is_best = not session.best or _rank(row) > _rank(session.best)
        if is_best:
            session.best = row
        with watch.stage("checkpoint"):
            if is_best:
                with session.averaged():
                    session.save("best.pt")
            session.save("last.pt")
        for tracker in trackers:
            tracker.epoch(row)
        if stop:
            raise Interrupted(stop[0], session.run_dir)


def _steps_done(step: TrainingStep) -> int:
    """Return the steps that an interrupted epoch has behind it; 0 where the next epoch begins."""
    return int(step.feed.cursor) // step.batch_size % step.num_steps


def _is_stale(session: Session, console: Console) -> bool:
    """Return whether the validation accuracy has not risen for `--patience` epochs."""
    patience = session.config.patience
    if patience is None or session.epoch - session.best.get("epoch", session.epoch) < patience:
        return False
    console.line(f"ended early: no better validation accuracy for {patience} epochs")
    return True


def _run_epoch(step: TrainingStep, engine: Engine, done: int) -> Iterator[tuple[int, Score]]:
    """Run an epoch's steps in portions of about a tenth of a second; yield the steps queued and the score so far."""
    portion, live = 1, Live(step.sums)
    while done < step.num_steps:
        start = time.perf_counter()
        portion = min(portion, step.num_steps - done)
        step.feed.drive(engine.run, portion)
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
    elif data.loader == "stream":
        console.line("every photo was checked before")
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
