"""Races whose rivals fail, and what is kept of a benchmark when it ends."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import __main__ as command
from bench.harness.race import SCALES, Race
from bench.harness.step_setup import make_step, num_images, random_feed, run_steps
from bench.harness.timing import Apart, RivalFailed
from fastcnn.training.engine_choice import STEPS_PER_REPLAY
from fastcnn.training.engines import Graphed


class Timed:
    """Stands in for pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.name, self.group, self.extra_info = "", "step", dict[str, Any]()
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=list[float]()))

    def pedantic(self, run: Any, *, setup: Any, rounds: int, warmup_rounds: int) -> None:
        for _ in range(warmup_rounds + rounds):
            setup()
            self.stats.stats.data.append(run())
        del self.stats.stats.data[:warmup_rounds]


@pytest.mark.parametrize("good_rounds", [0, 2])
def test_a_rival_that_fails_is_left_out_and_named(good_rounds: int, capsys: pytest.CaptureFixture[str]) -> None:
    calls = 0

    def failing() -> float:
        nonlocal calls
        calls += 1
        if calls > good_rounds:
            raise RivalFailed("CUDA out of memory")
        return 1.0

    race = Race(Timed(), torch.device("cpu"), SCALES["smoke"])
    race("ours", lambda: None, {"bad": failing, "good": lambda: 2.0}, images=8, rounds=3)
    info = race.benchmark.extra_info
    assert info["over"].keys() == info["baseline_seconds"].keys() == {"good"}
    assert info["failed_baselines"] == {"bad": "CUDA out of memory"}
    assert calls == good_rounds + 1
    assert "bad failed: CUDA out of memory" in capsys.readouterr().out


@pytest.mark.long
def test_a_rival_that_failed_fails_from_then_on() -> None:
    raising, rival = Apart("os:no_such_loop"), Apart("os:_exit", 3)  # both import torch at once
    for _ in range(2):
        with pytest.raises(RivalFailed, match="no_such_loop"):
            raising(1)
    raising.close()
    for _ in range(2):
        with pytest.raises(RivalFailed, match="its process ended"):
            rival(1)
    rival.close()


@pytest.mark.parametrize(
    ("options", "gpu", "scale"),
    [
        (["--quick"], True, "gpu"),
        (["--quick"], False, "quick"),
        (["--quick", "--device", "cpu"], True, "quick"),
        ([], True, "full"),
        (["--scale", "smoke"], True, "smoke"),
    ],
)
def test_quick_on_a_gpu_has_epochs_that_are_no_mere_overhead(
    options: list[str], gpu: bool, scale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert command._scale(command._parser().parse_args(options)) == scale
    assert SCALES["gpu"]["num_photos"] * 0.8 >= 10_000


@pytest.mark.parametrize("batch", SCALES["full"]["batches"])
def test_steps_are_timed_over_epochs_that_hold_whole_replays(batch: int) -> None:
    """8 a replay would else be timed one by one, from a batch of 128 on."""
    replays: list[int] = []

    def capture(steps: Callable[[], None]) -> Callable[[], None]:
        number = len(replays)
        replays.append(0)

        def replay() -> None:
            replays[number] += 1

        return replay

    cpu = torch.device("cpu")
    step = make_step(random_feed(cpu, 64, 32), (4,) * 5, 4, "fp32")
    engine = Graphed(step, capture=capture, steps_per_replay=STEPS_PER_REPLAY)
    step.num_steps = num_images(torch.device("cuda"), batch) // batch
    run_steps(step, engine, 3 * step.num_steps)
    assert replays == [0, 3 * step.num_steps // STEPS_PER_REPLAY]
