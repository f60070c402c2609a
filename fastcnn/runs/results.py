"""What a run leaves once it is trained: test figures, result.json, pictures, exports, and word to the trackers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastcnn.data.dataset import Dataset
from fastcnn.data.feeds import Feed
from fastcnn.errors import FastCNNError, first_line, warn
from fastcnn.reporting import class_scores as scorecard
from fastcnn.reporting import plots as pictures
from fastcnn.reporting import run_report as report
from fastcnn.reporting.outcome import Outcome, Sample
from fastcnn.runs import state as sessions
from fastcnn.runs import trackers as tracking
from fastcnn.runs.state import Session
from fastcnn.runs.trackers import Tracker
from fastcnn.storage import checkpoint, files
from fastcnn.system.console import Console
from fastcnn.system.device import describe_hardware, peak_memory_bytes, versions
from fastcnn.system.stopwatch import Stopwatch
from fastcnn.training.evaluation import Evaluation

STAGES = ("import", "scan", "decode", "upload", "compile", "train", "eval", "checkpoint", "report", "export")


def finish(
    session: Session,
    data: Dataset,
    feeds: Mapping[str, Feed],
    watch: Stopwatch,
    trackers: Sequence[Tracker],
    console: Console,
) -> dict[str, Any]:
    """Return what result.json holds, after writing all that a run leaves; of several ranks the first writes it.

    The test set is looked at here, once, with the best weights. Whatever goes wrong with pictures, exports or trackers
    does not lose the run: it is a warning, or `export_error` in what is returned.
    """
    folder, config, ranks = session.run_dir, session.config, session.ranks
    judged = "test" if len(data.photos("test")) else "val"
    story, drawn, evaluation = None, dict[str, bytes](), None
    if judged == "test" or config.report:
        with watch.stage("eval"):
            best = ranks.broadcast(lambda: checkpoint.load(folder / "best.pt"))
            session.model.load_state_dict(best["model"])
            session.step.parameters.refresh()
            evaluation = sessions.judge(session, feeds[judged])
    if not ranks.first:
        return ranks.broadcast(dict[str, Any])
    if config.report and evaluation:
        with watch.stage("report"):
            story, drawn = _draw(session, data, judged, evaluation)
    summary = _summary(session, data, watch, evaluation if judged == "test" else None)
    _write(folder, summary)  # whatever comes now, the figures are kept
    with watch.stage("export"):
        exported, summary["export_error"] = _export(session, console)
    summary["seconds"] = _seconds(watch)
    if story:
        try:
            report.write(folder, story, drawn, summary, config.to_dict())
        except OSError as error:
            warn(f"the run is finished, but its report cannot be written: {error}")
    outcome = Outcome(
        summary=summary,
        classes=session.classes,
        confusion=story.scorecard.confusion if story else None,
        samples=story.samples if story else (),
        exported=exported,
    )
    summary |= tracking.finish(trackers, outcome)
    summary["finished"] = True
    _write(folder, summary)
    return ranks.broadcast(lambda: summary)


def _summary(session: Session, data: Dataset, watch: Stopwatch, test: Evaluation | None) -> dict[str, Any]:
    config, device = session.config, session.step.number.device
    steady = session.rows[1:] or session.rows
    return {
        "finished": False,  # until all that a run leaves is there
        "engine": config.engine,
        "engine_reason": session.why,
        "decoder": config.decoder,
        "loader": config.loader,
        "loader_reason": data.loader_reason,
        "precision": config.precision,
        "device": config.device,
        "epochs": session.epoch,
        "best_epoch": int(session.best["epoch"]),
        "devices": config.devices,
        **{f"num_{split}": len(data.photos(split)) for split in ("train", "val", "test")},
        "num_bad": len(data.bad),
        "num_damaged": len(data.damaged),
        "num_decoded": data.cache.num_decoded,
        "skipped_steps": int(session.step.skipped),
        "val_accuracy": session.best["val/accuracy"],
        "val_loss": session.best["val/loss"],
        "test_accuracy": test.score.accuracy if test else None,
        "test_loss": test.score.loss if test else None,
        # Steady state: the mean over the epochs after the first, by time.
        "images_per_second": len(steady) / sum(1 / row["images_per_second"] for row in steady),
        "seconds": _seconds(watch),
        "peak_memory_bytes": peak_memory_bytes(device),
        "versions": versions(),
        "hardware": describe_hardware(device),
    }


def _seconds(watch: Stopwatch) -> dict[str, float]:
    stages = {name: watch.seconds.get(name, 0.0) for name in STAGES}
    return {**stages, "total": watch.total() + watch.seconds["import"]}


def _write(folder: Path, summary: dict[str, Any]) -> None:
    files.write(folder / "result.json", json.dumps(summary, indent=1) + "\n")


def _draw(
    session: Session, data: Dataset, judged: str, evaluation: Evaluation
) -> tuple[report.Report | None, dict[str, bytes]]:
    """Return the report and its pictures; whatever goes wrong with them is a warning, as the run is finished."""
    try:
        story = _tell(session, data, judged, evaluation)
        return story, report.draw(story)
    except Exception as error:
        warn(f"the run is finished, but its pictures cannot be drawn: {first_line(error)}")
        return None, {}


def _tell(session: Session, data: Dataset, judged: str, evaluation: Evaluation) -> report.Report:
    """Return what the report tells of, from an evaluation of the photos of the split `judged`."""
    photos, classes = data.photos(judged), session.classes
    labels = data.index.labels[photos]
    predicted, probabilities = evaluation.predicted.cpu().numpy(), evaluation.probabilities.cpu().numpy()
    confidence = probabilities[np.arange(len(predicted)), predicted]
    chosen = pictures.choose_samples(labels, predicted, confidence)
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
    return report.Report(
        rows=session.rows,
        best_epoch=int(session.best["epoch"]),
        judged=judged,
        scorecard=scorecard.make(classes, evaluation.score, labels, predicted, probabilities),
        samples=samples,
        filters=session.model.get_parameter("blocks.0.conv.weight").detach().cpu().numpy(),
        split={
            split: np.bincount(data.index.labels[data.photos(split)], minlength=len(classes))
            for split in ("train", "val", "test")
        },
        bad=data.bad,
    )


def _export(session: Session, console: Console) -> tuple[list[Path], str | None]:
    """Export as configured; return the files and, where one cannot be made, why."""
    exported: list[Path] = []
    if session.config.export:
        from fastcnn.export.exporters import export_run

        for name in session.config.export:
            try:
                exported.append(export_run(session.run_dir, format=name, note=console.line))
            except (FastCNNError, OSError, RuntimeError) as error:  # torch makes a full disk a RuntimeError
                return exported, str(error) if isinstance(error, FastCNNError) else f"no export: {first_line(error)}"
    return exported, None
