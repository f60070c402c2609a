"""W&B agent: trains the trials that W&B's server asks for, each in a trial process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastcnn.config import OPTIONS, in_our_words, read_yaml, resolve
from fastcnn.errors import FastCNNError, first_line, warn
from fastcnn.runs.wandb_server import answers, logged_in
from fastcnn.sweeps.search_space import Sweep
from fastcnn.sweeps.sweep import SWEEPS
from fastcnn.sweeps.trial_process import Ending, Job, TrialProcess
from fastcnn.system.console import Console


def run(
    sweep: Sweep,
    options: Mapping[str, Any],
    *,
    sweep_id: str | None = None,
    trials: int | None = None,
    folder: Path | None = None,
    console: Console | None = None,
) -> str:
    """Run trials as an agent of a W&B sweep until the server has no more, or `trials` of them; return the sweep's id.

    Args:
        sweep: the sweep file; begun on the server where there is no `sweep_id`.
        options: options of every trial, as `fastcnn.config.resolve` takes them.
        sweep_id: a sweep that was begun: ID, PROJECT/ID or ENTITY/PROJECT/ID.
        trials: number of trials that this agent runs; None is as many as the server asks for.
        folder: folder of the run folders, each named by its W&B id; None is `sweeps/` with the sweep's name.
        console: where progress is shown; None shows nothing.

    Raises FastCNNError where nobody is logged in, the server refuses, or trials failed and none finished.
    """
    import wandb

    console, folder = console or Console(quiet=True), folder or SWEEPS / sweep.name
    settings = wandb.setup().settings
    if not logged_in(settings):
        raise FastCNNError("--wandb: not logged in: run wandb login, or leave out --wandb to search with Optuna here")
    if not answers(settings.base_url):
        raise FastCNNError(f"--wandb: {settings.base_url} does not answer: try again, or leave out --wandb")
    project = (
        resolve(options).wandb_project or os.environ.get("WANDB_PROJECT") or sweep.text.get("project") or "fastcnn"
    )
    (folder / "locks").mkdir(parents=True, exist_ok=True)
    process = TrialProcess(lambda epoch: False, warn)  # the server prunes, not we
    endings: list[Ending] = []

    def trial() -> None:
        """Train the trial that W&B's agent describes by environment variables and a file."""
        run_id = os.environ["WANDB_RUN_ID"]
        values = read_parameters(Path(os.environ["WANDB_SWEEP_PARAM_PATH"]))
        console.line(f"{run_id}  " + " ".join(f"{name}={value}" for name, value in values.items()))
        ending = process.run(_job(folder, run_id, {**options, **values}))
        endings.append(ending)
        if ending.state == "failed":
            raise FastCNNError(ending.reason)

    try:
        if sweep_id is None:
            sweep_id = wandb.sweep(dict(sweep.text), project=project)
        wandb.agent(sweep_id, function=trial, project=project, count=trials)
    except FastCNNError:
        raise
    except Exception as error:  # whatever the server answers
        raise FastCNNError(f"W&B: {first_line(error)}") from None
    finally:
        process.close()
    if endings and all(ending.state == "failed" for ending in endings):
        raise FastCNNError(f"no trial finished: {len(endings)} failed, the last with: {endings[-1].reason}")
    return sweep_id


def _job(folder: Path, run_id: str, options: Mapping[str, Any]) -> Job:
    return Job(
        options=options,
        run_dir=str((folder / run_id).resolve()),
        lock=str((folder / "locks" / run_id).resolve()),
        # The trial starts a wandb service of its own.
        environment={k: v for k, v in os.environ.items() if k.startswith("WANDB_") and k != "WANDB_SERVICE"},
    )


def read_parameters(path: Path) -> dict[str, Any]:
    """Return the options in the file that W&B's agent writes for a run: a mapping of names, ours or another trainer's,
    to {value: ...}."""
    given = read_yaml(path, 4)
    return dict(
        (name, entry["value"]) if name.replace("-", "_") in OPTIONS else in_our_words(name, entry["value"])
        for name, entry in given.items()
        if isinstance(entry, dict) and "value" in entry and name != "wandb_version"
    )
