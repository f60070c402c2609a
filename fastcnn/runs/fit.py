"""`fit`: from a configuration to a trained model in a run folder. This module owns the training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import yaml

from fastcnn.config.coerce import parse_interval
from fastcnn.config.fields import Config
from fastcnn.data import dataset, split
from fastcnn.data.dataset import Dataset
from fastcnn.data.feeds import Feed
from fastcnn.data.loaders import LOADERS, Options
from fastcnn.errors import DataError, FastCNNError, UsageError, fall_back, first_line
from fastcnn.network.kernels import cpu_max_pool as pool
from fastcnn.runs import failures as memory
from fastcnn.runs import finite
from fastcnn.runs import state as sessions
from fastcnn.runs import trackers as tracking
from fastcnn.runs.results import finish
from fastcnn.runs.resume import Interrupted, restore, what_is_saved
from fastcnn.runs.state import Session
from fastcnn.runs.trackers import Run, Tracker
from fastcnn.storage import files, locks
from fastcnn.storage import run_folder as runs
from fastcnn.system import launch, ranks, signals
from fastcnn.system.console import Console
from fastcnn.system.device import (
    describe_hardware,
    is_out_of_memory,
    num_cores,
    pick_device,
    pick_precision,
    torch_settings,
    versions,
)
from fastcnn.system.ranks import Ranks
from fastcnn.system.stopwatch import Stopwatch
from fastcnn.training import engines
from fastcnn.training.engines import Engine
from fastcnn.training.evaluation import BATCH_SIZE, Evaluator
from fastcnn.training.metrics import Live, Score
from fastcnn.training.step import TrainingStep


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
    trackers: Sequence[Callable[[Run], Tracker]] = (),
) -> Result:
    """Train as configured and return the result; everything else is in the run folder.

    Args:
        config: the run.
        run_dir: where to; None takes the next free name under `runs/`. A folder with files in it is refused.
        resume: the run to go on with from its `last.pt`, in its folder; `config` is then that of `resumed_config`.
        console: where progress is shown; None shows nothing.
        import_seconds: what importing cost before this call, for the time table.
        trackers: where the figures go beside `tracker.TRACKERS`; what one raises ends the run, after saving it.

    Where torchrun has started this process among others, all of them train one model: `devices` is then their number.

    Raises DataError where the photos cannot be used, Interrupted on SIGINT and SIGTERM after saving `last.pt`, and
    FastCNNError for whatever else the user can mend.
    """
    started = launch.num_ranks()
    if config.devices != (started or 1):
        here = f"torchrun has started {started}" if started else "`fastcnn train` or torchrun starts them"
        raise UsageError(f"--devices {config.devices}: {here}")
    with signals.raising(), ranks.joined(_kind(config)) as group:
        config = _resolve(config, group)
        console = console if console and group.first else Console(quiet=True)
        try:
            with _folder(config, run_dir, resume, group) as (folder, going_on), _said(folder):
                return _fit(config, folder, going_on, group, console, import_seconds, trackers)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            why = first_line(error)
        # Only here, as the traceback is gone with all that it holds.
        raise FastCNNError(memory.advice(config, why, folder / "last.pt"))


@contextlib.contextmanager
def _folder(
    config: Config, run_dir: str | Path | None, resume: str | Path | None, group: Ranks
) -> Iterator[tuple[Path, bool]]:
    """Yield the run's folder, made and held by the first rank, and whether to go on with what is in it.

    Ranks that torchrun has started again go on in the folder that the first ones kept for them.
    """
    with contextlib.ExitStack() as stack:

        def find() -> tuple[Path, bool]:
            kept = (group.recall("run folder") or run_dir) if group.restarts else None
            going_on = resume or (kept if kept and (Path(kept) / runs.CONFIG).is_file() else None)
            if going_on:
                folder = runs.find(going_on)
            else:
                folder = stack.enter_context(runs.folder(kept or run_dir, Path(config.data).name or "run"))
            stack.enter_context(locks.held(folder))
            group.keep("run folder", str(folder.resolve()))
            return folder, bool(going_on)

        yield group.broadcast(find)


@contextlib.contextmanager
def _said(folder: Path) -> Iterator[None]:
    """Turn signals and what the disk refuses into errors that say how to go on."""
    try:
        yield
    except signals.Stopped as stopped:
        raise Interrupted(stopped.signum, what_is_saved(folder)) from None
    except OSError as error:
        where = error.filename or folder
        raise FastCNNError(
            f"cannot write {where}: {error.strerror or error}; mend that; {what_is_saved(folder)}"
        ) from None


def _fit(
    config: Config,
    folder: Path,
    resume: bool,
    group: Ranks,
    console: Console,
    import_seconds: float,
    more_trackers: Sequence[Callable[[Run], Tracker]],
) -> Result:
    """Do what `fit` does, in a folder that is there."""
    watch = Stopwatch()
    watch.seconds["import"] = import_seconds
    device = _device(config, group)
    tf32 = config.precision == "tf32"
    own_split = folder / "split.csv"
    begun = group.broadcast(lambda: resume and (folder / "last.pt").is_file())
    own_split_there = group.broadcast(lambda: resume and own_split.is_file())
    if group.restarts:
        console.line(f"restart {group.restarts}: going on in {folder}")
    if not begun and group.first:
        _write_config(folder, config)  # so that a run that is killed before its first step can be resumed as well
    with torch_settings(device, threads=config.threads, deterministic=config.deterministic, tf32=tf32):
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
                split=own_split if own_split_there else config.split,
                max_bad=config.max_bad,
                max_pixels=config.max_pixels,
                strict=config.strict,
                ranks=group,
                progress=lambda done, total: progress(done, total, ""),
                note=console.line,
                stopwatch=watch,
            )
        config = dataclasses.replace(config, decoder=data.decoder)
        with watch.stage("compile"):
            _load_kernels(device, strict=config.strict)
        _report_cache(console, data)
        if len(data.photos("train")) < config.batch_size:
            raise DataError(
                f"{len(data.photos('train'))} training photos do not fill one batch of {config.batch_size}: "
                "lower --batch-size or add photos"
            )
        if resume and not begun:
            console.line("nothing was saved yet: beginning again")
        data, (feeds, session, engine, evaluator) = _set_up(config, folder, data, watch, console, begun, group)
        if session.why:
            console.line(f"engine {session.config.engine}: {session.why}")
        if group.first:
            _write_inputs(session, data)
        train, val, test = (f"{len(data.photos(split)):,} {split}" for split in ("train", "val", "test"))
        where = f"{device}" if group.count == 1 else f"{group.count} ranks on {device.type}"
        console.line(
            f"{train}, {val}, {test} photos; {session.config.engine} engine, {config.precision}, {where}; "
            f"run folder {session.run_dir}"
        )
        run = Run(
            run_dir=session.run_dir,
            console=console,
            num_epochs=config.epochs,
            config={
                **session.config.to_dict(),
                "hardware": describe_hardware(device),
                "versions": versions(),
            },
            rows=tuple(session.rows),
        )
        opened = tracking.opened(run, more_trackers) if group.first else contextlib.nullcontext(list[Tracker]())
        with opened as trackers:
            with signals.received() as stop:
                _train(session, data, engine, evaluator, watch, trackers, console, stop)
            summary = finish(session, data, feeds, watch, trackers, console)
    _report(console, summary, session.run_dir)
    if summary["export_error"]:
        raise FastCNNError(summary["export_error"])
    return Result(session.run_dir, session.rows, summary)


Ready = tuple[dict[str, Feed], Session, Engine, Evaluator]


def _set_up(
    config: Config, folder: Path, data: Dataset, watch: Stopwatch, console: Console, begun: bool, group: Ranks
) -> tuple[Dataset, Ready]:
    """Return the data and what trains on them; photos that `--loader auto` found no room for are mapped."""
    try:
        return data, _make_ready(config, folder, data, watch, console, begun, group)
    except (RuntimeError, MemoryError) as error:
        alone = config.loader == "auto" and data.loader == "resident" and group.count == 1  # else others wait for us
        if not alone or not is_out_of_memory(error):
            raise
        why = f"resident ran out of memory ({first_line(error)})"
    memory.release()
    fall_back(f"loader mapped: {why}", strict=config.strict)
    data = dataclasses.replace(data, loader="mapped", loader_reason=why)
    return data, _make_ready(config, folder, data, watch, console, begun, group)


def _make_ready(
    config: Config, folder: Path, data: Dataset, watch: Stopwatch, console: Console, begun: bool, group: Ranks
) -> Ready:
    config, device = dataclasses.replace(config, loader=data.loader), _device(config, group)

    def feed(photos: npt.NDArray[np.intp], batch_size: int, **share: int) -> Feed:
        options = Options(
            device=device,
            batch_size=batch_size,
            decoder=config.decoder,
            workers=config.workers,
            crop_scale=dict(config.augmentations).get("crop"),
            max_pixels=config.max_pixels,
            **share,
        )
        return LOADERS[config.loader](data.index, data.cache, photos, options)

    with watch.stage("upload"):
        feeds = {"train": feed(data.photos("train"), config.batch_size, rank=group.rank, num_ranks=group.count)}
        for split in ("val", "test"):  # shared out once and for all
            feeds[split] = feed(data.photos(split)[group.rank :: group.count], BATCH_SIZE)
    labels = data.index.labels[data.photos("train")]
    session = sessions.start(config, folder, data.index.classes, feeds["train"], labels, fresh=not begun, ranks=group)
    if begun:
        restore(session, console)
    with watch.stage("compile"):
        engine = sessions.make_engine(session)
        evaluator = sessions.make_evaluator(session, feeds["val"])
        if device.type != "cpu":  # an eager engine has run nothing yet: does the step fit?
            engines.time_step(engine, session.step, 1)
    return feeds, session, engine, evaluator


def _kind(config: Config) -> str:
    """Return cpu, cuda or mps; ranks that are not joined yet and have none of it say so once."""
    try:
        return pick_device(config.device).type
    except FastCNNError as error:
        if launch.speaks():
            raise
        raise ranks.Told(error.exit_code) from None


def _device(config: Config, group: Ranks) -> torch.device:
    return pick_device(config.device, group.local_rank)


def _resolve(config: Config, group: Ranks) -> Config:
    """Return the configuration with every "auto" but decoder and engine replaced by what it is on this machine."""
    if not config.data:
        raise UsageError("which photos? fastcnn train DATA, where DATA is a folder of photos")
    device = _device(config, group)
    if group.count > 1 and ":" in config.device:
        raise UsageError(
            f"--device {config.device} is one device, and there are {group.count} ranks: give {device.type}"
        )
    cores = max(1, num_cores() // group.local_count)
    return dataclasses.replace(
        config,
        data=str(Path(config.data).resolve()),
        split=config.split and str(Path(config.split).resolve()),
        cache_dir=config.cache_dir and str(Path(config.cache_dir).resolve()),
        init_from=config.init_from
        and str(Path(config.init_from).resolve() if Path(config.init_from).exists() else config.init_from),
        device=device.type if group.count > 1 else str(device),
        precision=pick_precision(config.precision, device, deterministic=config.deterministic, strict=config.strict),
        threads=config.threads or cores,
        workers=config.workers or (cores if group.count > 1 else None),
    )


def _load_kernels(device: torch.device, *, strict: bool) -> None:
    if device.type == "cpu" and sys.platform == "linux":
        try:
            pool.load()
        except pool.NoKernel as error:
            fall_back(f"training without the fast pooling kernel: {error}", strict=strict)


def _train(
    session: Session,
    data: Dataset,
    engine: Engine,
    evaluator: Evaluator,
    watch: Stopwatch,
    trackers: list[Tracker],
    console: Console,
    stop: list[int],
) -> None:
    """Run the epochs that are left. `stop` holds the signal that asks the run to end, once one came."""
    config, step, group = session.config, session.step, session.ranks
    saving = Saving(config.checkpoint_every)
    while session.epoch < config.epochs and not _is_stale(session, console):
        epoch, start = session.epoch + 1, time.perf_counter()
        done, skipped, save_seconds = session.steps_done, int(step.skipped), watch.seconds.get("checkpoint", 0.0)
        step.parameters.compute.train()
        with (
            watch.stage("train"),
            step.start_epoch(config.seed, epoch, done, session.chances),
            console.progress(f"epoch {epoch}/{config.epochs}", "steps") as progress,
        ):
            if not done:
                step.sums.reset()
            for queued, live in _run_epoch(step, engine, done, saving):
                rate = (live.count * group.count - done * config.batch_size) / (time.perf_counter() - start)
                progress(queued, step.num_steps, f"loss {live.loss:.4f}  {max(rate, 0):,.0f} images/s")
                if not math.isfinite(live.loss):
                    finite.check(session, data, epoch, skipped, queued)
                stopped, due = group.highest(*stop[:1] or [0], saving.due(queued))
                # An epoch whose steps are done is finished first.
                if (stopped or due) and queued < step.num_steps:
                    finite.check(session, data, epoch, skipped, queued)
                    with watch.stage("checkpoint"):
                        session.save("last.pt")
                    saving.saved()
                    if stopped:
                        raise Interrupted(stopped, what_is_saved(session.run_dir))
            if group.joined:  # the sums of all ranks are the first's from here on, as in a checkpoint
                group.sum_(step.sums.values)
            train = step.sums.read()  # the epoch's one synchronisation
            if not group.first:
                step.sums.reset()
            save_seconds -= watch.seconds.get("checkpoint", 0.0)
            train_seconds = time.perf_counter() - start + save_seconds
        finite.check(session, data, epoch, skipped, step.num_steps)
        session.agree()
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
        row = group.broadcast(functools.partial(dict, row))  # times differ
        session.rows.append(row)
        is_best = not session.best or _rank(row) > _rank(session.best)
        if is_best:
            session.best = row
        with watch.stage("checkpoint"):
            session.save("last.pt")  # first: whatever comes now, best.pt can be made of it
            if is_best:
                session.save_best()
        saving.saved()
        for tracker in trackers:
            tracker.epoch(row)
        (stopped,) = group.highest(*stop[:1] or [0])
        if stopped:
            raise Interrupted(stopped, what_is_saved(session.run_dir))


class Saving:
    """When `last.pt` is to be saved within an epoch."""

    def __init__(self, every: str | None) -> None:
        self.steps, self.seconds = parse_interval(every or "")
        self.saved()

    def saved(self) -> None:
        """Begin to count anew."""
        self.last = time.perf_counter()

    def due(self, done: int) -> bool:
        """Return whether it is time, `done` steps into an epoch."""
        if self.steps:
            return done % self.steps == 0
        return self.seconds is not None and time.perf_counter() - self.last >= self.seconds

    def limit(self, portion: int, done: int) -> int:
        """Return how many of the next steps may be queued before it is time."""
        return min(portion, self.steps - done % self.steps) if self.steps else portion


def _is_stale(session: Session, console: Console) -> bool:
    """Return whether the validation accuracy has not risen for `--patience` epochs."""
    patience = session.config.patience
    if patience is None or session.epoch - session.best.get("epoch", session.epoch) < patience:
        return False
    console.line(f"ended early: no better validation accuracy for {patience} epochs")
    return True


def _run_epoch(step: TrainingStep, engine: Engine, done: int, saving: Saving) -> Iterator[tuple[int, Score]]:
    """Run an epoch's steps in portions of about a tenth of a second; yield the steps queued and the score so far."""
    portion, live = 1, Live(step.sums)
    while done < step.num_steps:
        start = time.perf_counter()
        portion = min(portion, step.num_steps - done)
        now = -step.ranks.highest(-saving.limit(portion, done))[0]  # as many as the slowest rank takes
        step.feed.drive(engine.run, now)
        live.mark()
        done += now
        yield done, live.score
        if time.perf_counter() - start < 0.1:
            portion *= 2


def _rank(row: dict[str, float]) -> tuple[float, float]:
    """Order epochs: the highest validation accuracy, ties by loss; a loss that is no number is the worst."""
    loss = row["val/loss"]
    return row["val/accuracy"], -loss if loss == loss else float("-inf")


def _write_inputs(session: Session, data: Dataset) -> None:
    folder = session.run_dir
    _write_config(folder, session.config)
    split.write_split(folder / "split.csv", data.index, data.splits)
    dataset.write_bad(folder / "bad_images.csv", data.bad)


def _write_config(folder: Path, config: Config) -> None:
    text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
    files.write(folder / runs.CONFIG, text)


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
