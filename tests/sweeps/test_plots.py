"""Plots of a sweep."""

from __future__ import annotations

import pytest

from fastcnn.sweeps import plots

pytest.importorskip("optuna")


@pytest.mark.parametrize("count", [1, 2, 9])
def test_parallel_coordinates_of_any_parameters(count: int) -> None:
    points = [
        (
            {"filters": [8 * (i % 3 + 1)] * 5, "batch_norm": i % 2 == 0, "lr": 10.0 ** -(i % 5), "val/loss": i / 9},
            i % 3 > 0,
        )
        for i in range(count)
    ]
    plot = plots.parallel_coordinates(points, "val/loss", logs=["lr"], maximize=count == 2)
    assert plot.startswith(b"\x89PNG")


def test_axes() -> None:
    places, ticks = plots.axis([0.001, 0.1, 0.01], log=True)
    assert places == pytest.approx([0, 1, 0.5])
    assert [label for _, label in ticks] == ["0.001", "0.01", "0.1"]
    assert plots.axis([True, False])[1] == [(0.0, "False"), (1.0, "True")]
    assert plots.axis(["a"])[0] == [0.5]
    assert [label for _, label in plots.axis([1, 10, 100, 1e3, 1e4, 1e5, 1e8], log=True)[1]] == [
        "1", "100", "1e+04", "1e+06", "1e+08",
    ]  # fmt: skip
