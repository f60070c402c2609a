from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.errors import FastCNNWarning
from fastcnn.network.kernels import cpu_max_pool
from fastcnn.runs.build import load_cpu_kernels


@pytest.fixture
def library() -> Iterator[None]:
    cpu_max_pool.load.cache_clear()
    try:
        cpu_max_pool.load()
    except cpu_max_pool.NoKernel as error:
        pytest.skip(str(error))
    yield
    cpu_max_pool.load.cache_clear()


def both(x: Tensor, gradient: Tensor, relu: bool) -> tuple[list[Tensor], list[Tensor]]:
    results = []
    bias = torch.linspace(-1, 1, x.shape[1]).to(x.dtype)
    for kernel in (True, False):
        leaf, added = x.detach().clone().requires_grad_(), bias.clone().requires_grad_()
        if kernel:
            assert cpu_max_pool.usable(leaf)
            out = cpu_max_pool.max_pool(leaf, added, relu)
        else:
            out = F.max_pool2d(leaf, 2) + added[:, None, None]
            out = F.relu(out) if relu else out
        gradients = torch.autograd.grad(out, [leaf, added], gradient)
        results.append([out.detach(), *gradients])
    return results[0], results[1]


@pytest.mark.parametrize("dtype", list(cpu_max_pool.NAMES))
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (3, 5, 4, 6), (2, 32, 16, 16), (2, 40, 6, 2)])
def test_equal_to_torch_to_the_bit(library: None, dtype: torch.dtype, relu: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    count, channels, height, width = shape
    x = torch.randn(shape)
    x[torch.rand(shape) < 0.3] = 0.5  # ties
    x[torch.rand(shape) < 0.1] = -0.0
    x[torch.rand(shape) < 0.1] = 0.0
    x[torch.rand(shape) < 0.05] = float("-inf")
    x = x.to(dtype).to(memory_format=torch.channels_last)
    gradient = torch.randn(count, channels, height // 2, width // 2).to(dtype)
    ours, torchs = both(x, gradient, relu)
    for a, b in zip(ours[:2], torchs[:2], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(ours[2], torchs[2])


@pytest.mark.parametrize("relu", [True, False])
def test_nan_comes_through(library: None, relu: bool) -> None:
    x = torch.zeros(1, 2, 4, 4).to(memory_format=torch.channels_last)
    x[0, 0, 1, 2] = float("nan")
    x[0, 1, 3, 0] = -float("nan")
    ours, torchs = both(x, torch.ones(1, 2, 2, 2), relu)
    assert torch.equal(ours[0].isnan(), torchs[0].isnan())
    assert ours[0].isnan().sum() == 2


def test_what_it_does_not_take(library: None) -> None:
    good = torch.zeros(1, 4, 6, 6).to(memory_format=torch.channels_last)
    assert cpu_max_pool.usable(good)
    assert not cpu_max_pool.usable(good.contiguous())
    assert not cpu_max_pool.usable(good.double())
    assert not cpu_max_pool.usable(good[:, :, :5])
    cpu_max_pool.load.cache_clear()
    assert not cpu_max_pool.usable(good)


@pytest.mark.skipif(sys.platform != "linux", reason="built on Linux only")
def test_no_compiler_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu_max_pool.load.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.warns(FastCNNWarning, match="no C compiler"):
        load_cpu_kernels(torch.device("cpu"), strict=False)
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'cc: out of order' >&2\nexit 1\n")
    os.chmod(broken, 0o755)  # noqa: PTH101
    monkeypatch.setenv("CC", str(broken))
    with pytest.warns(FastCNNWarning, match="out of order"):
        load_cpu_kernels(torch.device("cpu"), strict=False)
    assert not list(tmp_path.glob("fastcnn/network/kernels/*"))
