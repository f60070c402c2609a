"""Code that inductor makes of a step's parts for a GPU."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.utils._pytree import tree_map_only

from bench.kernels.pretended_gpu import GPU


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
