"""Sweeps run by W&B's agent: its command lines, and trials in its process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fastcnn.cli import app as cli
from fastcnn.config import read_yaml, resolve
from fastcnn.errors import FastCNNError
from fastcnn.sweeps import sweep_file, wandb_agent
from tests.sweeps.test_sweep import SMALL, _inline, plan

pytest.importorskip("optuna")
__all__ = ["_inline"]


def agents_lines(count: int) -> list[list[str]]:
    """Command lines as W&B's agent makes them of the shipped file, each parameter at its next value."""
    from wandb.sdk.launch.sweeps import utils

    text = yaml.safe_load(sweep_file.shipped())
    lines = []
    for i in range(count):
        chosen = {
            name: {"value": p["values"][i % len(p["values"])] if "values" in p else p["min"] * (1 + i)}
            for name, p in text["parameters"].items()
        }
        replaced = utils.create_sweep_command_args({"args": chosen})
        lines.append([word for w in text["command"] for word in replaced.get(w[2:-1], [w])])
    return lines


def test_the_agents_command_lines_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    for line in agents_lines(6):
        assert line[0] == "fastcnn"
        status = cli.main([*line[1:], "--print-config"])
        assert status == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        given = dict(word.removeprefix("--").split("=", 1) for word in line if word.startswith("--"))
        assert len(given) == 9
        assert {name: printed[name] for name in given} == {
            name: value for name, value in resolve(given).to_dict().items() if name in given
        }


def test_a_line_of_the_agents_runs(photos: Path) -> None:
    line = [str(photos) if word.startswith("photos/") else word for word in agents_lines(2)[1]]
    assert "--batch_norm=False" in line
    status = cli.main([*line[1:], "--epochs=1", "--image-size=32", "--limit-train-batches=1", "--no-report", "--quiet"])
    assert not status


@pytest.mark.usefixtures("_inline")
def test_as_an_agent(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def agent(sweep_id: str, function: Any, project: str, count: int) -> None:
        for number in range(count):
            parameters = tmp_path / f"config-{number}.yaml"
            parameters.write_text(
                f"wandb_version: 1\n\nlr:\n  value: {[0.001, 1e30][number]}\nfilters:\n  value: [4, 4, 4, 8, 8]\n"
            )
            monkeypatch.setenv("WANDB_RUN_ID", f"run{number}")
            monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(parameters))
            try:
                function()
            except FastCNNError as error:
                failed.append(str(error))
        begun.append((sweep_id, project))

    begun: list[Any] = []
    failed: list[str] = []
    monkeypatch.setattr(wandb, "agent", agent)
    monkeypatch.setattr(wandb, "sweep", lambda text, project: begun.append(text) or "abc")
    monkeypatch.setattr(wandb_agent, "logged_in", lambda settings: True)
    monkeypatch.setattr(wandb_agent, "answers", lambda url: True)
    with pytest.raises(FastCNNError, match=r"no trial finished: 2 failed, the last with: .* do not fill one batch"):
        wandb_agent.run(plan(), {"data": str(photos), "batch_size": 1000}, trials=2, folder=Path("failing"))
    begun.clear()
    failed.clear()
    sweep_id = wandb_agent.run(plan(project="mine"), {"data": str(photos), **SMALL}, trials=2)
    assert sweep_id == "abc"
    assert begun == [plan(project="mine").text, ("abc", "mine")]
    assert len(failed) == 1
    assert "loss" in failed[0]
    values = read_yaml(Path("sweeps/small/run0/config.yaml"))
    assert (values["lr"], values["filters"]) == (0.001, [4, 4, 4, 8, 8])
    assert Path("sweeps/small/run0/result.json").exists()


def test_an_agent_needs_a_login(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_agent, "logged_in", lambda settings: False)
    with pytest.raises(FastCNNError, match="not logged in: run wandb login"):
        wandb_agent.run(plan(), {"data": str(photos)})
