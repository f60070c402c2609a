"""The study of a sweep: no trial is lost or run twice, and every process draws the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastcnn.errors import FastCNNError, UsageError
from fastcnn.sweeps import plots
from fastcnn.sweeps.study import ClaimedTrial, Study
from fastcnn.sweeps.sweep_file import parse

pytest.importorskip("optuna")

PARAMETERS: dict[str, Any] = {
    "filters": {"values": [[8, 8, 8, 8, 8], [4, 8, 8, 16, 16]]},
    "batch_norm": {"values": [True, False]},
    "lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
    "dropout": {"distribution": "q_uniform", "min": 0, "max": 0.4, "q": 0.2},
    "batch_size": {"min": 8, "max": 16},
    "momentum": {"distribution": "normal", "mu": 0.5, "sigma": 0.01},
    "activation": {"values": ["relu", "gelu"], "probabilities": [0.9, 0.1]},
}
GRID = {name: PARAMETERS[name] for name in ("filters", "batch_norm")}


class Open:
    """Opens studies, and closes them after the test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.opened = folder, []

    def __call__(
        self,
        method: str = "random",
        *,
        space: dict[str, Any] | None = None,
        storage: str | None = None,
        seed: int = 0,
        folder: str = "",
        **more: Any,
    ) -> Study:
        text = {"method": method, "parameters": space or (GRID if method == "grid" else PARAMETERS), **more}
        study = Study(
            self.folder / folder,
            parse(text, "s.yaml"),
            storage=storage,
            seed=seed,
            definition={"method": method, "parameters": text["parameters"]},
        )
        self.opened.append(study)
        return study


@pytest.fixture
def open_study(tmp_path: Path) -> Iterator[Open]:
    opening = Open(tmp_path / "sweep")
    yield opening
    for study in opening.opened:
        study.close()


def row(epoch: int, accuracy: float) -> dict[str, float]:
    return {"epoch": epoch, "val/accuracy": accuracy, "val/loss": 1 - accuracy}


def finish(study: Study, trial: ClaimedTrial | None, accuracy: float = 0.5) -> None:
    assert trial is not None
    study.report(trial, row(1, accuracy), may_prune=False)
    study.tell(trial, "finished")


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_a_trial_is_the_same_whoever_draws_it(method: str, open_study: Open, tmp_path: Path) -> None:
    def values(**options: Any) -> list[dict[str, Any]]:
        drawn, study = [], open_study(method, **options)
        for i in range(4):
            if i == 2:  # opened again in between
                study.close()
                study = open_study(method, **options)
            trial = study.claim(4)
            assert trial
            finish(study, trial, i / 10)
            drawn.append(trial.values)
        return drawn

    first = values(folder="a")
    assert values(folder="b") == first
    assert values(folder="c", seed=1) != first
    if method == "bayes":  # which looks into the storage
        assert values(folder="d", storage=f"sqlite:///{tmp_path / 'sweep.db'}") == first
    assert len({str(drawn) for drawn in first}) == 4


def test_values_are_what_the_options_take(open_study: Open) -> None:
    study = open_study()
    for _ in range(6):
        trial = study.claim(6)
        assert trial
        values = trial.values
        assert values["filters"] in ([8, 8, 8, 8, 8], [4, 8, 8, 16, 16])
        assert values["dropout"] in (0, 0.2, 0.4)
        assert 8 <= values["batch_size"] <= 16
        assert 0.4 < values["momentum"] < 0.6
        assert values["activation"] in ("relu", "gelu")
        finish(study, trial)
    assert study.claim(6) is None


SPACE = {
    "filters": {"values": [[8], [4], [4]]},
    "dropout": {"distribution": "q_uniform", "min": 0.05, "max": 0.4, "q": 0.2},
    "batch_size": {"min": 8, "max": 9},
    "activation": {"values": ["relu", "gelu", "selu"], "probabilities": [0.999, 0.001, 0]},
}


@pytest.mark.parametrize("method", ["random", pytest.param("bayes", marks=pytest.mark.long)])
def test_a_small_space_is_used_up_point_by_point(method: str, open_study: Open) -> None:
    def values(folder: str) -> list[str]:
        study, drawn = open_study(method, space=SPACE, folder=folder), []
        while trial := study.claim(100):
            drawn.append(str(trial.values))
            if len(drawn) == 5:
                study.tell(trial, "failed", "as it would again")
            elif len(drawn) != 7:  # which is still running
                finish(study, trial, len(drawn) / 100)
        return drawn

    drawn = values("a")
    assert len(drawn) == len(set(drawn)) == 2 * 3 * 2 * 2 == open_study(space=SPACE).sweep.num_points
    assert values("b") == drawn


def test_an_endless_space_has_no_number_of_points(open_study: Open) -> None:
    assert open_study().sweep.num_points is None


def test_a_grid_ends_with_its_last_point(open_study: Open) -> None:
    study, seen = open_study("grid"), set()
    while trial := study.claim(100):
        seen.add(str(trial.values))
        finish(study, trial)
    assert len(seen) == 4


def test_a_trial_whose_process_is_gone_is_resumed(open_study: Open) -> None:
    first = open_study()
    finish(first, first.claim(3))
    lost = first.claim(3)
    assert lost
    first.report(lost, row(1, 0.3), may_prune=False)
    second = open_study()
    other = second.claim(3)
    assert other
    assert other.number == 2, "while the first lives, its trial is its own"
    assert second.claim(3) is None
    first.close()  # as the system does for a process that is killed
    found = second.claim(3)
    assert found
    assert (found.number, found.resumed, found.values) == (lost.number, True, lost.values)
    second.report(found, row(1, 0.3), may_prune=False)
    second.report(found, row(2, 0.7), may_prune=False)
    assert second.tell(found, "finished").value == 0.7
    assert second.claim(3) is None
    finish(second, other)
    assert [(record.number, record.state) for record in second.records()] == [
        (0, "finished"),
        (1, "finished"),
        (2, "finished"),
    ]


def test_a_trial_of_another_folder_is_left_alone(open_study: Open, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'sweep.db'}"
    first = open_study(folder="here", storage=storage)
    assert first.claim(2)
    first.close()
    second = open_study(folder="there", storage=storage)
    trial = second.claim(2)
    assert trial
    assert (trial.number, trial.resumed) == (1, False)
    assert second.claim(2) is None


def test_the_best_trial_follows_the_goal(open_study: Open) -> None:
    study = open_study(metric={"name": "val/loss", "goal": "minimize"})
    for accuracy in (0.2, 0.6, 0.4):
        finish(study, study.claim(3), accuracy)
    best = study.best()
    assert best
    assert (best.number, best.value) == (1, pytest.approx(0.4))


def test_nothing_is_begun_beyond_the_target(open_study: Open) -> None:
    study = open_study(metric={"name": "val/accuracy", "goal": "maximize", "target": 0.8})
    finish(study, study.claim(9), 0.7)
    finish(study, study.claim(9), 0.9)
    assert study.claim(9) is None


def test_a_trial_that_is_behind_is_pruned(open_study: Open) -> None:
    study = open_study(early_terminate={"type": "hyperband", "min_iter": 2, "eta": 2})
    for accuracy in (0.5, 0.6, 0.7):
        finish(study, study.claim(9), accuracy)
    good, bad = study.claim(9), study.claim(9)
    assert good
    assert bad
    assert not study.report(good, row(1, 0.1), may_prune=True), "before the first rung nobody is judged"
    assert not study.report(good, row(2, 0.9), may_prune=True)
    assert not study.report(bad, row(2, 0.2), may_prune=False), "nor in the last epoch"
    third = study.claim(9)
    assert third
    assert study.report(third, row(2, 0.2), may_prune=True)
    record = study.tell(third, "pruned")
    assert (record.state, record.value, record.epochs) == ("pruned", 0.2, 2)


def test_a_trial_without_a_metric_has_failed(open_study: Open) -> None:
    study = open_study()
    trial = study.claim(1)
    assert trial
    study.report(trial, row(1, float("nan")), may_prune=True)
    record = study.tell(trial, "finished")
    assert (record.state, record.value) == ("failed", None)
    assert "val/accuracy" in record.reason


def test_a_journal_that_was_cut_short_is_read(open_study: Open) -> None:
    study = open_study()
    finish(study, study.claim(3))
    with (open_study.folder / "journal.log").open("ab") as file:
        file.write(b'{"op_code": 4, "wor')
    finish(study, study.claim(3))
    study.close()
    assert [record.state for record in open_study().records()] == ["finished", "finished"]


def test_another_sweep_is_refused(open_study: Open, tmp_path: Path) -> None:
    open_study().close()
    with pytest.raises(UsageError, match=r"begun with another method: .*--dir"):
        open_study("bayes")
    with pytest.raises(UsageError, match=r"begun with other parameters: "):
        open_study(space=GRID)
    with pytest.raises(UsageError, match="begun with another --storage"):
        open_study(storage=f"sqlite:///{tmp_path / 'sweep.db'}")


def test_a_storage_that_cannot_be_used_is_one_line(open_study: Open) -> None:
    with pytest.raises(FastCNNError, match=r"cannot use the storage nothing://here.*see --storage"):
        open_study(storage="nothing://here")


def test_importance_leaves_pyplot_as_it_was(open_study: Open) -> None:
    import matplotlib.pyplot as plt

    study, before = open_study(), dict(plt.rcParams)
    for i in range(4):
        finish(study, study.claim(4), i / 10)
    assert plots.importance(study.optuna, "val/accuracy").startswith(b"\x89PNG")
    assert dict(plt.rcParams) == before
    assert plt.get_fignums() == []
