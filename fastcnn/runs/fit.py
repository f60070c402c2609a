"""`fit`: from a configuration to a trained model in a run folder, stage by stage."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fastcnn.config import Config, read_yaml, require_data
from fastcnn.data import dataset, split_file
from fastcnn.data.dataset import Dataset
from fastcnn.errors import DataError, FastCNNError, UsageError, first_line
from fastcnn.runs.build import Training, build
from fastcnn.runs.failures import explained, memory_advice
from fastcnn.runs.loop import train
from fastcnn.runs.results import finish
from fastcnn.runs.state import RunContext
from fastcnn.runs.trackers import Run, Tracker, opened
from fastcnn.storage import checkpoint, files, run_folder
from fastcnn.storage.paths import user_cache_folder
from fastcnn.system import launch, ranks, signals
from fastcnn.system.console import Console
from fastcnn.system.device import (
    describe_hardware,
    is_out_of_memory,
    num_cores,
    peak_memory_bytes,
    pick_device,
    pick_precision,
    versions,
)
from fastcnn.system.ranks import Ranks
from fastcnn.system.stopwatch import Stopwatch
from fastcnn.system.switches import torch_settings
from fastcnn.training.engines import compiles


@dataclass(frozen=True)
class Result:
    """Folder and figures of a finished run."""

    run_dir: Path
    metrics: list[dict[str, float]]
    """A row per epoch, as in metrics.csv."""
    summary: dict[str, Any]
    """Content of result.json."""


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
        config: of the run.
        run_dir: an empty or new folder; None takes the next free name under `runs/`.
        resume: an earlier run to continue from its `last.pt`, in its folder; `config` is then `resumed_config`'s.
        console: where progress is shown; None shows nothing.
        import_seconds: what importing took before this call, for the table of times.
        trackers: more of them, beside `trackers.TRACKERS`; an error that one raises ends the run, after saving it.

    Under torchrun, its processes train one model together; `devices` must be their number.

    Raises DataError if the images cannot be used, RunInterrupted on a signal after saving `last.pt`, and
    FastCNNError for anything else that the user can mend.
    """
    _check_devices(config)
    with signals.raising(), ranks.joined(_device_type(config)) as group:
        config = resolve_machine(config, group)
        console = console if console and group.first else Console(quiet=True)
        device = pick_device(config.device, group.local_rank)
        watch = Stopwatch({"import": import_seconds}, lambda: peak_memory_bytes(device))
        try:
            with _open_folder(config, run_dir, resume, group) as (folder, resuming), explained(folder):
                has_checkpoint = group.broadcast(lambda: resuming and (folder / "last.pt").is_file())
                run = RunContext(
                    config=config,
                    run_dir=folder,
                    resuming=resuming,
                    has_checkpoint=has_checkpoint,
                    ranks=group,
                    console=console,
                    stopwatch=watch,
                )
                return _fit(run, trackers)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            why = first_line(error)
        # Only here, where the traceback is gone and with it the memory that it held.
        raise FastCNNError(memory_advice(config, why, folder))


def _fit(run: RunContext, more_trackers: Sequence[Callable[[Run], Tracker]]) -> Result:
    """Train in a folder that is open."""
    config = run.config
    user_cache_folder(strict=config.strict)  # before anything is decoded; kernels and timings are kept there
    tf32 = config.precision == "tf32"
    compiling = compiles(config.engine, run.device)
    with torch_settings(
        run.device, threads=config.threads, deterministic=config.deterministic, tf32=tf32, compiles=compiling
    ):
        data = _prepare_photos(run)
        training = build(run, data)
        _record_inputs(run, training)
        with _trackers(run, training, more_trackers) as trackers:
            with signals.received() as stop:
                train(run, training, trackers, stop)
            summary = finish(run, training, trackers)
    _print_result(run, summary)
    if summary["export_error"]:
        raise FastCNNError(summary["export_error"])
    return Result(run.run_dir, training.state.rows, summary)


# Resolve


def _check_devices(config: Config) -> None:
    """Raise UsageError if `devices` is not the number of processes."""
    launched = launch.num_ranks()
    if config.devices != (launched or 1):
        reason = f"torchrun has started {launched}" if launched else "`fastcnn train` or torchrun starts them"
        raise UsageError(f"--devices {config.devices}: {reason}")


def _device_type(config: Config) -> str:
    """Return cpu, cuda or mps; if the device is missing, only the first rank of a machine reports it."""
    try:
        return pick_device(config.device).type
    except FastCNNError as error:
        if launch.is_first_on_machine():
            raise
        raise ranks.ReportedElsewhere(error.exit_code) from None


def resolve_machine(config: Config, group: Ranks) -> Config:
    """Return the configuration with paths made absolute, and device, precision, threads and workers of this machine.

    "auto" is left for the decoder, the loader and the engine.
    """
    require_data(config.data, "train")
    device = pick_device(config.device, group.local_rank)
    if group.count > 1 and ":" in config.device:
        raise UsageError(
            f"--device {config.device} is one device, and there are {group.count} ranks: give {device.type}"
        )
    cores = max(1, num_cores() // group.local_count)
    # Another number of threads rounds differently.
    may_choose_threads = not (config.threads or config.deterministic) and group.count == 1 and device.type == "cpu"
    init = Path(config.init_from or "")
    init_is_path = init.is_file() or (init / run_folder.CONFIG).is_file()  # else a name under runs/
    return dataclasses.replace(
        config,
        data=str(Path(config.data).resolve()),
        split=_absolute(config.split),
        cache_dir=_absolute(config.cache_dir),
        init_from=_absolute(config.init_from) if init_is_path else config.init_from,
        device=device.type if group.count > 1 else str(device),
        precision=pick_precision(config.precision, device, deterministic=config.deterministic, strict=config.strict),
        threads=None if may_choose_threads else config.threads or cores,
        workers=config.workers or (cores if group.count > 1 else None),
    )


def _absolute(path: str | None) -> str | None:
    return path and str(Path(path).resolve())


# Open the folder


@contextlib.contextmanager
def _open_folder(
    config: Config, run_dir: str | Path | None, resume: str | Path | None, group: Ranks
) -> Iterator[tuple[Path, bool]]:
    """Yield the run folder, which the first rank makes and locks, and whether it holds an earlier part of the run.

    Ranks that torchrun has restarted continue in the folder of their predecessors.
    """
    with contextlib.ExitStack() as stack:

        def find() -> tuple[Path, bool]:
            kept = (group.recall("run folder") or run_dir) if group.restarts else None
            earlier = resume or (kept if kept and (Path(kept) / run_folder.CONFIG).is_file() else None)
            if earlier:
                folder = run_folder.find(earlier)
                stack.enter_context(run_folder.held(folder))
            else:
                folder = stack.enter_context(run_folder.folder(kept or run_dir, _name_of(config.data)))
            group.keep("run folder", str(folder.resolve()))
            return folder, bool(earlier)

        yield group.broadcast(find)


def _name_of(data: str) -> str:
    path = Path(data)
    return (path.stem if path.is_file() else path.name) or "run"


# Prepare photos


def _prepare_photos(run: RunContext) -> Dataset:
    """Return the dataset: scanned, decoded into the cache and split. Raises DataError if it fills no batch.

    A run that goes on keeps its classes in their order; DataError where the photos are of others.
    """
    config, device, console = run.config, run.device, run.console
    if run.ranks.restarts:
        console.line(f"restart {run.ranks.restarts}: continuing in {run.run_dir}")
    split, moved_from = run.ranks.broadcast(lambda: _own_split(run))
    if not (run.has_checkpoint or moved_from) and run.ranks.first:
        write_config(run.run_dir, config)  # so that a run killed before its first step can be resumed as well
    elsewhere = f"to go on where its photos are now: fastcnn train FOLDER --resume {shlex.quote(str(run.run_dir))}"
    listed = split_file.missing_listed(run.run_dir, config.data, elsewhere)
    with listed if run.resuming else contextlib.nullcontext(), console.progress("decoding", "photos") as progress:
        data = dataset.prepare(
            dataclasses.replace(config, split=split),
            gpu=device.index if device.type == "cuda" else None,
            seed=config.seed,
            moved_from=moved_from,
            strict=config.strict,
            ranks=run.ranks,
            progress=progress,
            note=console.line,
            stopwatch=run.stopwatch,
        )
    if run.has_checkpoint:
        data = data.with_classes(run.ranks.broadcast(lambda: checkpoint.load(run.run_dir / "last.pt")["classes"]))
    console.line(_decoding_line(data))
    num_train = len(data.photos("train"))
    if num_train < config.batch_size:
        raise DataError(
            f"{num_train} training photos do not fill one batch of {config.batch_size}: "
            "lower --batch-size or add photos"
        )
    return data


def _own_split(run: RunContext) -> tuple[str | None, str]:
    """Return the split file to read, and the folder that its photos lay in, where the run was resumed with another."""
    own = run.run_dir / split_file.NAME
    if not (run.resuming and own.is_file()):
        return run.config.split, ""
    before = read_yaml(run.run_dir / run_folder.CONFIG).get("data", "")
    return str(own), "" if before == run.config.data else str(before)


def _decoding_line(data: Dataset) -> str:
    cache = data.cache
    if cache.num_decoded:
        rate = cache.num_decoded / cache.decode_seconds
        return f"decoded {cache.num_decoded:,} photos with {data.decoder}, {rate:,.0f} photos/s"
    if data.loader == "stream":
        return "every photo was checked before"
    return "every photo is in the cache: nothing to decode"


# Train


def _record_inputs(run: RunContext, training: Training) -> None:
    """Write what the run is made from into its folder, and print it."""
    state, data, console = training.state, training.data, run.console
    if run.resuming and not run.has_checkpoint:
        console.line("nothing was saved yet: beginning again")
    if state.engine_reason:
        console.line(f"engine {state.config.engine}: {state.engine_reason}")
    if run.ranks.first:
        write_config(run.run_dir, state.config)
        split_file.write_split(run.run_dir / split_file.NAME, data.index, data.split_numbers, data.cache.digests)
        files.write_csv(run.run_dir / "bad_images.csv", [("path", "reason"), *data.bad.items()])
    counts = ", ".join(f"{len(data.photos(split)):,} {split}" for split in ("train", "val", "test"))
    where = f"{run.device}" if run.ranks.count == 1 else f"{run.ranks.count} ranks on {run.device.type}"
    console.line(
        f"{counts} photos; {state.config.engine} engine, {state.config.precision}, {where}; run folder {run.run_dir}"
    )


def write_config(run_dir: Path, config: Config) -> None:
    """Write config.yaml, from which `fastcnn train --config` repeats the run."""
    text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
    files.write(run_dir / run_folder.CONFIG, text)


def _trackers(
    run: RunContext, training: Training, more: Sequence[Callable[[Run], Tracker]]
) -> contextlib.AbstractContextManager[list[Tracker]]:
    """Return a context manager of the first rank's trackers; the other ranks have none."""
    if not run.ranks.first:
        return contextlib.nullcontext(list[Tracker]())
    config = training.state.config
    facts = {**config.to_dict(), "hardware": describe_hardware(run.device), "versions": versions()}
    rows = tuple(training.state.rows)
    return opened(
        Run(run_dir=run.run_dir, console=run.console, num_epochs=config.epochs, config=facts, rows=rows), more
    )


# Finish


def _print_result(run: RunContext, summary: dict[str, Any]) -> None:
    test = "" if summary["test_accuracy"] is None else f"; test accuracy {summary['test_accuracy']:.4f}"
    run.console.line(
        f"best epoch {summary['best_epoch']}: val accuracy {summary['val_accuracy']:.4f} "
        f"loss {summary['val_loss']:.4f}{test}"
    )
    run.console.line(
        f"{summary['images_per_second']:,.0f} images/s, {summary['seconds']['total']:.1f} s in all; "
        f"results in {run.run_dir}"
    )
