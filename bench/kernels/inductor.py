"""Code that inductor makes of a step's parts for a GPU, and its compilation."""

from __future__ import annotations

import copy
import importlib.util
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.utils._pytree import tree_map_only

from bench.kernels.pretended_gpu import GPU, pretended_driver, pretended_gpu


def gpu_code(graph: fx.GraphModule, inputs: Sequence[Any]) -> str:
    """Return the Python that inductor makes of a graph traced on a CPU, for a GPU; inside `pretended_gpu` only."""
    from torch._inductor.compile_fx import _recursive_post_grad_passes, record_original_output_strides
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    moved, mode = copy.deepcopy(graph), detect_fake_mode(inputs)
    assert mode is not None
    with V.set_fake_mode(mode):
        record_original_output_strides(moved)
        _recursive_post_grad_passes(moved, is_inference=False)
        with mode:
            there = tree_map_only(Tensor, _on_gpu, list(inputs))
            for node in moved.graph.nodes:
                node.args, node.kwargs = tree_map_only(torch.device, lambda _: GPU, (node.args, node.kwargs))
                if "val" in node.meta:
                    node.meta["val"] = tree_map_only(Tensor, _on_gpu, node.meta["val"])
        moved.recompile()
        lowering = GraphLowering(moved, example_inputs=there, shape_env=mode.shape_env)
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*there)
            return str(lowering.codegen()[0].value)


def _on_gpu(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=GPU)


def compile_inductors_kernels(code: str) -> list[str]:
    """Compile the Triton kernels in `gpu_code`'s result to machine code for sm_90; return their names."""
    from torch._inductor.runtime import triton_helpers
    from triton.runtime.driver import driver

    found = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.DOTALL)
    with (
        tempfile.TemporaryDirectory() as folder,
        pretended_gpu(),
        mock.patch.object(driver, "_active", pretended_driver(90)),
        mock.patch.object(triton_helpers, "set_driver_to_gpu"),
    ):
        for name, source in found:
            path = Path(folder) / f"{name}.py"
            path.write_text(source, encoding="utf-8")
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec
            assert spec.loader
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            kernel = getattr(module, name)
            for config in kernel.configs:
                kernel._precompile_config(config)
    return [name for name, _ in found]
