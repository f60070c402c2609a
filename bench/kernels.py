"""Fused kernels without a GPU: their machine code, and how many of them a training step launches.

    python -m bench.kernels [--types bf16 fp16 fp32] [--architectures 80 90] [--activations relu gelu ...] [--quick]
    python -m bench.kernels --launches [--types bf16 fp16 fp32] [--augment flip shift ...]

The first prints registers, spills and tensor-core instructions of each kernel, compiled by Triton for an architecture.

The second runs steps on a CPU and counts what they would launch on a GPU: each recorded `Launch` of the blocks' Triton
kernels; outside of compiled parts each ATen operator that is neither a view nor an allocation, as one launch, which is
the least (a reduction may take two); in compiled parts the kernels and library calls in the code that inductor makes
for an H100. The graphs are traced on the CPU and then moved to a pretended GPU, so they are fused as they are there.
Kernels within a library call count as one: figures may be too low by a few. `gpu_profile.py` counts on a real GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import itertools
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from bench.harness.step_setup import make_step, random_feed
from bench.report.tables import markdown
from fastcnn.config import STRENGTHS
from fastcnn.network.fused_forward import FusedForward
from fastcnn.network.kernels import autotune
from fastcnn.network.small_cnn import ACTIVATIONS
from fastcnn.system.device import DTYPES
from fastcnn.training import engines
from fastcnn.training.step import forward

PRECISIONS = ["bf16", "fp16", "fp32"]
FILTERS = [(32,) * 5, (64,) * 5, (32, 64, 128, 256, 512)]
ARCHITECTURES = [80, 90]
TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "uint8": "u8", "int32": "i32", "int64": "i64"}
GPU = torch.device("cuda", 0)
BLOCKS = "blocks"
NO_LAUNCH = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}
CALLS = re.compile(r"\b(?:triton_\w+\.run|extern_kernels\.\w+|torch\.ops\.(?!fastcnn)[\w.]+|\w+\.copy_)\(")
OWN_CALLS = re.compile(r"\btorch\.ops\.fastcnn\.move_towards\.default\(")  # the blocks' operators count by themselves


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table; return 1 where a kernel spills, or multiplies 16-bit values without tensor cores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--architectures", nargs="+", type=int, default=ARCHITECTURES)
    parser.add_argument("--activations", nargs="+", default=list(ACTIVATIONS), choices=ACTIVATIONS)
    parser.add_argument("--quick", action="store_true", help="32x5 filters, the tiles that are used unmeasured")
    parser.add_argument("--launches", action="store_true", help="count the launches of a step instead")
    parser.add_argument("--augment", nargs="*", default=[], choices=list(STRENGTHS), help="with --launches")
    options = parser.parse_args(arguments)
    if options.launches:
        return print_launches(options.types, options.augment)
    return print_code(options)


def print_code(options: argparse.Namespace) -> int:
    """Print a line a kernel; return 1 where one is bad."""
    head = ["kernel", "sm", "type", "what", "registers", "spilled bytes", "shared bytes", "tensor-core instructions"]
    print(markdown(head, []), end="")
    bad = total = 0
    filters, every_tile = (FILTERS[:1], False) if options.quick else (FILTERS, True)
    for code in compiled_kernels(options.types, options.architectures, options.activations, filters, every_tile):
        total += 1
        bad += code.bad
        print(f"| {' | '.join(map(str, vars(code).values()))} |{' WRONG' if code.bad else ''}", flush=True)
    print(f"{total} kernels, {bad} that spill or multiply 16-bit values without tensor cores")
    return int(bad > 0)


def print_launches(precisions: Sequence[str], augment: Sequence[str]) -> int:
    """Print the launches of a step by engine and part; return 0."""
    columns = [BLOCKS, *engines.FUNCTIONS]
    print(markdown(["engine", "precision", *columns, "all"], []), end="")
    for precision, engine in itertools.product(precisions, ("fused", "fused+compiled")):
        found = count_launches(engine, precision, augment)
        figures = [str(found[name]) for name in columns]
        print(f"| {engine} | {precision} | {' | '.join(figures)} | {found.total()} |", flush=True)
    return 0


@dataclass(frozen=True)
class Code:
    """Machine code of a kernel, compiled for an architecture."""

    kernel: str
    architecture: int
    precision: str
    what: str
    """Shapes, tile and activation."""
    registers: int
    """Registers of a thread; there are 255."""
    spilled_bytes: int
    """Stack and local memory of a thread."""
    shared_bytes: int
    """Shared memory of a program."""
    tensor_core: int
    """mma and wgmma instructions."""

    @property
    def bad(self) -> bool:
        """Whether it spills, or multiplies 16-bit values without tensor cores."""
        multiplies = self.precision != "fp32" and not self.kernel.startswith("finish")
        return self.spilled_bytes > 0 or (multiplies and not self.tensor_core)


def compiled_kernels(
    precisions: Sequence[str],
    architectures: Sequence[int],
    activations: Sequence[str],
    filters: Sequence[tuple[int, ...]],
    every_tile: bool,
) -> Iterator[Code]:
    """Yield every kernel of these networks at 128 px once, by each tile that may be chosen or by the first of them."""
    seen = set()
    for precision, activation, widths in itertools.product(precisions, activations, filters):
        for launch in kernel_launches(widths, DTYPES[precision], activation, every_tile=every_tile):
            for architecture in architectures:
                source, what = _source(launch)
                key = launch.kernel.__name__, architecture, precision, what
                if key not in seen:
                    seen.add(key)
                    yield _compiled(launch, source, what, architecture, precision)


def kernel_launches(
    filters: Sequence[int],
    dtype: torch.dtype,
    activation: str = "relu",
    batch: int = 32,
    side: int = 128,
    every_tile: bool = False,
) -> list[Any]:
    """Return the launches of a training step with batch norm. Nothing is computed."""
    from fastcnn.network.kernels import block_gradients, block_operators

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    with autotune.recording(every_tile) as found:
        x, moments = empty(batch, side, side, 3, kind=torch.uint8), None
        photos, moves = empty(batch, kind=torch.int64), empty(batch, 3, kind=torch.int32)
        for number, (into, out) in enumerate(zip((3, *filters), filters, strict=False)):
            weight, bias = empty(out, into, 3, 3).to(memory_format=torch.channels_last), empty(out)
            gamma = empty(into, kind=torch.float32)
            if number == 0:
                colours = empty(3, 3, kind=torch.float32)
                made = _direct(block_operators.first_block)(
                    x, photos, moves, colours, weight, bias, activation, True, 1e-5
                )
            else:
                made = _direct(block_operators.block)(x, moments, gamma, gamma, weight, bias, activation, True, 1e-5)
            pooled, index, slopes, out_moments, _ = made
            gradients = pooled, out_moments
            kept = pooled, index, slopes, out_moments, activation
            if number == 0:
                _direct(block_gradients.first_block_backward)(*gradients, x, photos, moves, colours, *kept)
            else:
                _direct(block_gradients.block_backward)(*gradients, x, moments, gamma, gamma, weight, *kept)
            x, moments = pooled, out_moments
    return list(found)


def _direct(operator: Any) -> Any:
    """Return an operator's own function: on the device "meta" torch would call the fake one."""
    return operator._init_fn


def _source(launch: Any) -> tuple[Any, str]:
    """Return the source that triton compiles, and in words the shapes and the tile."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for number, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = "*" + TYPES[str(value.dtype).removeprefix("torch.")]
            attributes[(number,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(number,)] = [["tt.divisibility", 16]]
    shown = [str(v) for v in constants.values() if isinstance(v, int) and not isinstance(v, bool)]
    names = [v.__name__ for v in constants.values() if hasattr(v, "__name__")]
    return ASTSource(launch.kernel, signature, constants, attributes), " ".join(shown + names[:1])


def _compiled(launch: Any, source: Any, what: str, architecture: int, precision: str) -> Code:
    import triton
    from triton.backends.compiler import GPUTarget

    made = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages},
    )
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(tools / "cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    code = made.asm["ptx"]
    return Code(
        kernel=launch.kernel.__name__,
        architecture=architecture,
        precision=precision,
        what=what,
        registers=numbers["REG"],
        spilled_bytes=numbers["STACK"] + numbers["LOCAL"],
        shared_bytes=made.metadata.shared,
        tensor_core=len(re.findall(r"\bmma\.sync|\bwgmma\.mma_async", code)),
    )


def count_launches(
    engine: str, precision: str, augment: Sequence[str] = (), batch: int = 32, size: int = 128
) -> Counter[str]:
    """Return the launches of a step of the reference network: the blocks', and those of each part beside them."""
    strengths = [(name, STRENGTHS[name][0]) for name in augment]  # type: ignore[index]
    step = make_step(random_feed(torch.device("cpu"), 2 * batch, size), (32,) * 5, batch, precision, strengths)
    counting = Counting()
    functions = dataclasses.replace(step.functions, forward=FusedForward(forward), reads_unread_batches=True)
    if engine == "fused+compiled":
        functions = engines.with_compiled(functions, backend=counting.backend)
    counted: dict[str, Any] = {name: counting.under(name, getattr(functions, name)) for name in engines.FUNCTIONS}
    functions = dataclasses.replace(functions, **counted)
    with pretended_gpu(), autotune.recording() as blocks:
        step(functions)  # compiles
        counting.found.clear()
        blocks.clear()
        with counting:
            step(functions)
    torch._dynamo.reset()
    counting.found[BLOCKS] = len(blocks)
    return counting.found


class Counting(TorchDispatchMode):
    """Counts what would be launched, by part; what happens between parts, such as the backward, is the forward's."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()
        self.part, self.compiled = "forward", False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        blocks = func.namespace == "fastcnn" and name != "move_towards"
        if not (self.compiled or blocks or func.is_view or name in NO_LAUNCH):
            self.found[self.part] += 1
        return func(*args, **(kwargs or {}))

    def under(self, name: str, part: Callable[..., Any]) -> Callable[..., Any]:
        """Return a step's part that counts under its name."""

        def counted(*args: Any) -> Any:
            self.part = name
            try:  # dynamo runs nothing compiled under a mode
                with _disable_current_modes() if compiled else contextlib.nullcontext():
                    return part(*args)
            finally:
                self.part = "forward"

        compiled = hasattr(part, "_torchdynamo_orig_callable")
        return counted

    def backend(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        """Compile as inductor does, to what counts the calls of its code for a GPU and computes as it is written."""
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, inputs, inner_compile=self._counted)

    def _counted(self, graph: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Any:
        code = "\n".join(line for line in gpu_code(graph, inputs).splitlines() if not line.startswith("#"))
        number = len(CALLS.findall(code)) + len(OWN_CALLS.findall(code))

        def run(args: list[Any]) -> Any:
            self.found[self.part] += number
            self.compiled, given = True, list(args)
            args.clear()  # as is asked of what has `_boxed_call`
            try:
                return graph(*given)
            finally:
                self.compiled = False

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


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
    ):
        yield


if __name__ == "__main__":
    sys.exit(main())
