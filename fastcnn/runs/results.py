"""Results of a finished run: test figures, result.json, report, exports, and the trackers' last records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastcnn.data.dataset import Dataset
from fastcnn.data.feeds import Feed
from fastcnn.errors import FastCNNError, first_line, warn
from fastcnn.reporting import plots, run_report
from fastcnn.reporting.class_scores import score_classes
from fastcnn.reporting.outcome import Outcome, Sample
from fastcnn.runs import trackers as tracking
from fastcnn.runs.build import Training
from fastcnn.runs.state import RunContext, RunState
from fastcnn.runs.trackers import Tracker
from fastcnn.storage import checkpoint, files
from fastcnn.system.console import Console
from fastcnn.system.device import describe_hardware, versions
from fastcnn.system.stopwatch import OUTSIDE, Stopwatch
from fastcnn.training.evaluation import Evaluation, Evaluator

STAGES = ("import", "scan", "decode", "upload", "compile", "train", "eval", "checkpoint", "report", "export")


def finish(run: RunContext, training: Training, trackers: Sequence[Tracker]) -> dict[str, Any]:
    """Write everything that a run leaves, from the first rank; return what result.json holds.

    The test images are evaluated here, once, with the best weights. A failure in the report or a tracker is a warning,
    one in an export is `export_error` in the result: the run itself is not lost.
    """
    state, data, config = training.state, training.data, training.state.config
    split = "test" if len(data.photos("test")) else "val"
    evaluation = None
    if split == "test" or config.report:
        with run.stopwatch.stage("eval"):
            evaluation = _evaluate_best(state, training.feeds[split])
    if not run.ranks.first:
        return run.ranks.broadcast(dict[str, Any])
    report, drawn = None, dict[str, bytes]()
    if config.report and evaluation:
        with run.stopwatch.stage("report"):
            report, drawn = _draw_report(state, data, split, evaluation)
    summary = _summarize(training, run.stopwatch, evaluation if split == "test" else None)
    _write_result(run.run_dir, summary)  # now, so that a failure below does not lose the figures
    with run.stopwatch.stage("export"):
        exported, summary["export_error"] = _export(state, run.console)
    summary |= _costs(training, run.stopwatch)
    if report:
        try:
            run_report.write(run.run_dir, report, drawn, summary, config.to_dict())
        except OSError as error:
            warn(f"the run is finished, but its report cannot be written: {error}")
    outcome = Outcome(
        summary=summary,
        classes=state.classes,
        confusion=report.class_scores.confusion if report else None,
        samples=report.samples if report else (),
        exported=exported,
    )
    summary |= tracking.finish(trackers, outcome)
    summary["finished"] = True
    _write_result(run.run_dir, summary)
    return run.ranks.broadcast(lambda: summary)


def _evaluate_best(state: RunState, feed: Feed) -> Evaluation:
    """Load the best weights and return what they predict for every image of a feed."""
    best = state.ranks.broadcast(lambda: checkpoint.load(state.run_dir / "best.pt"))
    state.model.load_state_dict(best["model"])
    step = state.step
    step.parameters.refresh()
    # One pass: not worth compiling or capturing anything.
    evaluator = Evaluator(
        step.parameters.compute, feed, step.normalise, num_classes=len(state.classes), ranks=state.ranks
    )
    return evaluator()


def _summarize(training: Training, watch: Stopwatch, test: Evaluation | None) -> dict[str, Any]:
    """Return the content of result.json but for exports and trackers."""
    state, data, config = training.state, training.data, training.state.config
    device, steady = state.step.step_count.device, state.rows[1:] or state.rows
    return {
        "finished": False,  # until everything is written
        "engine": config.engine,
        "engine_reason": state.engine_reason,
        "decoder": config.decoder,
        "loader": config.loader,
        "loader_reason": data.loader_reason,
        "precision": config.precision,
        "device": config.device,
        "threads": {str(count): steps for count, steps in sorted(training.threads.steps.items())},
        "epochs": state.epoch,
        "best_epoch": int(state.best["epoch"]),
        "devices": config.devices,
        **{f"num_{split}": len(data.photos(split)) for split in ("train", "val", "test")},
        "num_bad": len(data.bad),
        "num_damaged": len(data.damaged),
        "num_decoded": data.cache.num_decoded,
        "skipped_steps": int(state.step.skipped),
        "val_accuracy": state.best["val/accuracy"],
        "val_loss": state.best["val/loss"],
        "test_accuracy": test.score.accuracy if test else None,
        "test_loss": test.score.loss if test else None,
        # Steady state: the harmonic mean over the epochs after the first.
        "images_per_second": len(steady) / sum(1 / row["images_per_second"] for row in steady),
        **_costs(training, watch),
        "versions": versions(),
        "hardware": describe_hardware(device),
    }


def _costs(training: Training, watch: Stopwatch) -> dict[str, Any]:
    """Return the entries of result.json on time and memory so far."""
    rises = watch.peak_rises()
    return {
        "seconds": {**{name: watch.seconds.get(name, 0.0) for name in STAGES}, "total": watch.total()},
        "peak_memory_bytes": sum(rises.values()),
        "memory_bytes": {
            "pixels": sum(feed.pixel_bytes for feed in training.feeds.values()),
            "network_and_optimizer": sum(tensor.nbytes for tensor in training.state.step.state()),
            "peak_by_stage": {name: rises.get(name, 0) for name in (*STAGES, OUTSIDE)},
        },
    }


def _write_result(run_dir: Path, summary: dict[str, Any]) -> None:
    files.write(run_dir / "result.json", json.dumps(summary, indent=1) + "\n")


def _draw_report(
    state: RunState, data: Dataset, split: str, evaluation: Evaluation
) -> tuple[run_report.Report | None, dict[str, bytes]]:
    """Return the report and its plots; a failure is a warning, as the run is finished."""
    try:
        report = _make_report(state, data, split, evaluation)
        return report, run_report.draw(report)
    except Exception as error:
        warn(f"the run is finished, but its plots cannot be drawn: {first_line(error)}")
        return None, {}


def _make_report(state: RunState, data: Dataset, split: str, evaluation: Evaluation) -> run_report.Report:
    """Return the report on an evaluation of a split's images."""
    photos, classes = data.photos(split), state.classes
    labels = data.index.labels[photos]
    predicted, probabilities = evaluation.predicted.cpu().numpy(), evaluation.probabilities.cpu().numpy()
    confidence = probabilities[np.arange(len(predicted)), predicted]
    chosen = plots.choose_samples(labels, predicted, confidence)
    samples = [
        Sample(
            path=data.index.paths[photos[i]],
            image=image,
            label=classes[labels[i]],
            predicted=classes[predicted[i]],
            probability=float(confidence[i]),
        )
        for i, image in zip(chosen, data.pixels(photos[chosen]), strict=True)
    ]
    return run_report.Report(
        rows=state.rows,
        best_epoch=int(state.best["epoch"]),
        judged=split,
        class_scores=score_classes(classes, evaluation.score, labels, predicted, probabilities),
        samples=samples,
        filters=state.model.get_parameter("blocks.0.conv.weight").detach().cpu().numpy(),
        split={
            name: np.bincount(data.index.labels[data.photos(name)], minlength=len(classes))
            for name in ("train", "val", "test")
        },
        bad=data.bad,
    )


def _export(state: RunState, console: Console) -> tuple[list[Path], str | None]:
    """Export as configured; return the files, and why one cannot be made."""
    exported: list[Path] = []
    if state.config.export:
        from fastcnn.export.exporters import export_run

        for name in state.config.export:
            try:
                with console.progress(f"exporting {name}", "images") as progress:
                    exported.append(export_run(state.run_dir, format=name, progress=progress, note=console.line))
            except (FastCNNError, OSError, RuntimeError) as error:  # torch makes a full disk a RuntimeError
                return exported, str(error) if isinstance(error, FastCNNError) else f"no export: {first_line(error)}"
    return exported, None
