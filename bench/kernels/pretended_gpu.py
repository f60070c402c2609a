"""A GPU that is not there: enough of it for Triton and inductor to compile for it, not to run anything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

GPU = torch.device("cuda", 0)


def pretended_driver(architecture: int) -> Any:
    """Return what Triton asks of a GPU before it compiles."""
    from triton.backends.compiler import GPUTarget

    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", architecture, 32),
        get_active_torch_device=lambda: GPU,
        get_current_device=lambda: architecture,  # what is compiled is kept by device
        set_current_device=lambda device: None,
        get_current_stream=lambda device: 0,
    )


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Let inductor take an H100 to be here: enough for it to make code, not to run it."""
    from torch._inductor import scheduler
    from torch._inductor.runtime.hints import DeviceProperties
    from torch.utils import _triton

    properties = DeviceProperties(
        type="cuda",
        index=0,
        multi_processor_count=132,
        cc=90,
        major=9,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
    )
    own = DeviceProperties.create

    def create(device: torch.device) -> Any:
        return properties if device.type == "cuda" else own(device)

    plain = SimpleNamespace(name="H100", major=9, minor=0, multi_processor_count=132, warp_size=32)
    with (
        mock.patch.object(DeviceProperties, "create", create),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=plain),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(scheduler, "has_triton", return_value=True),
        mock.patch.object(_triton, "triton_hash_with_backend", return_value="none"),
        torch._inductor.config.patch(compile_threads=1),  # torch 2.11's processes outlive this one by minutes
    ):
        yield
