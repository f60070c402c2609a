"""Random crops: where they lie in a photo, and what they depend on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcnn.data.crops import RATIO, SCALE, crop_boxes

sides = st.integers(1, 12_000)


@given(st.integers(0, 2**63 - 1), st.integers(1, 10_000), st.lists(st.tuples(sides, sides), min_size=1, max_size=20))
def test_crops_are_inside_the_photo(seed: int, epoch: int, sizes: list[tuple[int, int]]) -> None:
    array, numbers = np.array(sizes), np.arange(len(sizes))
    left, top, right, bottom = crop_boxes(seed, epoch, numbers, array).T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= array[:, 0]).all()
    assert (bottom <= array[:, 1]).all()
    assert (right > left).all()
    assert (bottom > top).all()
    large = array.min(1) >= 50
    share = (right - left) * (bottom - top) / array.prod(1)
    tries = np.minimum(array[:, 0] / array[:, 1] / RATIO[0], array[:, 1] / array[:, 0] * RATIO[1])
    assert (share[large] >= np.minimum(SCALE[0], tries[large]) - 1e-9).all()  # a strip cannot give so much
    ratios = ((right - left) / (bottom - top))[large]
    assert (ratios >= RATIO[0] - 1e-9).all()
    assert (ratios <= RATIO[1] + 1e-9).all()


@given(st.integers(0, 2**63 - 1), st.integers(1, 100), st.permutations(range(8)))
def test_crops_depend_on_seed_epoch_and_photo_alone(seed: int, epoch: int, order: list[int]) -> None:
    numbers, sizes = np.arange(8) * 1000, np.array([[400 + 10 * i, 300] for i in range(8)])
    boxes = crop_boxes(seed, epoch, numbers, sizes)
    assert (crop_boxes(seed, epoch, numbers[order], sizes[order]) == boxes[order]).all()
    assert (crop_boxes(seed, epoch, numbers[3:4], sizes[3:4]) == boxes[3:4]).all()
    assert (crop_boxes(seed, epoch + 1, numbers, sizes) != boxes).any(1).all()
    assert (crop_boxes(seed ^ 1, epoch, numbers, sizes) != boxes).any(1).all()


def test_crops_are_spread_as_they_should_be() -> None:
    count = 20_000
    left, top, right, bottom = crop_boxes(0, 1, np.arange(count), np.full((count, 2), 500)).T
    shares = (right - left) * (bottom - top) / 500**2
    ratios = np.log((right - left) / (bottom - top))
    across, down = left / (500 - right + left), top / (500 - bottom + top)  # of the room that there is
    assert np.corrcoef(across, down)[0, 1] == pytest.approx(0, abs=0.05)
    assert np.allclose(np.percentile([across, down], [10, 50, 90], axis=1).T, [0.1, 0.5, 0.9], atol=0.02)
    assert np.median(ratios) == pytest.approx(0, abs=0.01)
    # Of uniform areas, those too near the whole photo for their ratio are drawn again: small ones are all there.
    assert np.percentile(shares, 0.1) == pytest.approx(SCALE[0], abs=0.01)
    # A share s fits with probability min(1, ln s / ln 3/4): 0.35 below 0.7, in all 0.40 + 0.034 / 0.288 = 0.519.
    assert (shares < 0.7).mean() == pytest.approx(0.35 / 0.519, abs=0.01)
    assert left.min() < 1
    assert right.max() > 499
