"""What docs/assignment.md tells students holds for the network that they train."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from fastcnn.config import resolve
from fastcnn.network.small_cnn import SmallCNN
from fastcnn.sweeps import sweep_file

DOCS = Path(__file__).resolve().parents[2] / "docs"
GUIDE = (DOCS / "assignment.md").read_text(encoding="utf-8")
SWEEP = yaml.safe_load(sweep_file.shipped())


def counted(model: SmallCNN, side: int) -> tuple[int, int]:
    """Return parameters, and multiplications for one photo."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, side, side))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


@pytest.mark.parametrize(("m", "k", "n", "side", "classes"), [(32, 3, 128, 128, 10), (7, 5, 11, 64, 3)])
def test_the_formulas(m: int, k: int, n: int, side: int, classes: int) -> None:
    s = side // 32
    parameters = [m * (3 * k**2 + 1), 4 * m * (m * k**2 + 1), 10 * m, n * (m * s**2 + 1), classes * (n + 1)]
    multiplications = [3 * m * k**2 * side**2, m**2 * k**2 * side**2 * 85 // 256, n * m * s**2, classes * n]
    model = SmallCNN(classes, filters=(m,) * 5, kernel_size=k, dense_neurons=n, image_size=side)
    assert counted(model, side) == (sum(parameters), sum(multiplications))
    bare = SmallCNN(classes, filters=(m,) * 5, kernel_size=k, dense_neurons=n, image_size=side, batch_norm=False)
    assert counted(bare, side)[0] == sum(parameters) - 10 * m
    if side == 128:  # the guide's table of the defaults
        assert all(f"{value:,} |" in GUIDE for value in parameters + multiplications)
        assert f"**{sum(parameters):,}** | **{sum(multiplications):,}**" in GUIDE


def test_the_table_of_filters() -> None:
    rows = re.findall(r"^\| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", GUIDE, re.MULTILINE)
    assert len(rows) == 5
    for filters, *figures in rows:
        model = SmallCNN(10, filters=tuple(map(int, filters.split(","))))
        assert tuple(int(figure.replace(",", "")) for figure in figures) == counted(model, 128)


def test_a_training_step() -> None:
    model = SmallCNN(10)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 3, 128, 128)).sum().backward()
    assert f"{counter.get_total_flops() / 2 / 1e9:.3f} GFLOP a photo in training" in GUIDE


@pytest.mark.parametrize("name", sorted(SWEEP["parameters"]))
def test_the_sweep_names_options_as_the_agent_gives_them(name: str) -> None:
    assert SWEEP["command"][:2] == ["fastcnn", "train"]
    parameter = SWEEP["parameters"][name]
    for value in parameter.get("values") or [parameter["min"], parameter["max"]]:
        resolve({name: str(value)})
