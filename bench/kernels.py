"""GPU kernels without a GPU: machine code, issued instructions, launches, and the least time of a step by engine.

    python -m bench.kernels [--types bf16 fp16 fp32] [--architectures 80 90] [--filters 32,32,32,32,32]
    python -m bench.kernels --bounds [--write]

The first compiles every launch of a step's own kernels through Triton's specialisation, for a pretended GPU, and
prints registers, spilled bytes, shared memory and the warp instructions that a launch issues: those of each loop times
its rounds, and all others once. It fails where a kernel spills.

The second prints, for each engine and batch, what bounds a step of the reference network: launches at 2 us each, the
instructions of our kernels if every scheduler issued one a cycle, bytes over the bandwidth and FLOPs over the matrix
rate. `--write` puts the table into docs/engines.md. Launches are counted by running the step on a CPU, for small
images: each of our own; outside of compiled parts each ATen operator that is neither a view nor an allocation, as one,
which is the least; in compiled parts the kernels and library calls in the code that inductor makes for an H100. Library
convolutions are assumed: bytes and matrix rate alone. Figures may be too low by a few; `gpu_profile.py` counts on a
real GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib.util
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
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from bench.harness.roofline import passes
from bench.harness.step_setup import make_step, random_feed
from bench.report.tables import markdown
from fastcnn.config import STRENGTHS
from fastcnn.network.kernels import cpu_max_pool
from fastcnn.network.kernels import launch as launches
from fastcnn.network.kernels.launch import Launch
from fastcnn.training import engines
from fastcnn.training.step import StepFunctions, TrainingStep

ROOT = Path(__file__).resolve().parents[1]
PRECISIONS = ["bf16", "fp16", "fp32"]
REFERENCE = (32,) * 5
BATCHES = (32, 256, 2048)
GPU = torch.device("cuda", 0)
OWN = "own kernels"
NO_LAUNCH = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}
CALLS = re.compile(r"\b(?:triton_\w+\.run|extern_kernels\.\w+|torch\.ops\.[\w.]+|\w+\.copy_)\(")
MARKS = "<!-- bounds -->", "<!-- end of bounds -->"


class Card(NamedTuple):
    """Rates of a GPU, from its maker's data sheet; bandwidths as copies reach them."""

    name: str
    bytes_per_second: float
    flop_per_second: dict[str, float]
    """Dense products by precision: on tensor cores in 16 bits, without them in fp32."""
    multiprocessors: int = 132
    hertz: float = 1.755e9


SCHEDULERS = 4  # of a multiprocessor, each of which issues one warp instruction a cycle
LAUNCH_SECONDS = 2e-6  # between the ends of two small kernels of a replayed graph: assumed
RATES = {"bf16": 788e12, "fp16": 788e12, "fp32": 59e12}
CARDS = [Card("H200", 4.3e12, RATES), Card("H100", 3.0e12, RATES)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table; return 1 where a kernel spills registers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--architectures", nargs="+", type=int, default=[80, 90])
    parser.add_argument("--filters", type=lambda text: tuple(map(int, text.split(","))), default=REFERENCE)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--bounds", action="store_true", help="what bounds a step instead, by engine and batch")
    parser.add_argument("--write", action="store_true", help="with --bounds: into docs/engines.md")
    options = parser.parse_args(arguments)
    if options.bounds:
        text = bounds_table(options.batches)
        print(text, end="")
        if options.write:
            page = ROOT / "docs" / "engines.md"
            before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
            page.write_text(f"{before}{MARKS[0]}\n{text}{MARKS[1]}{rest.partition(MARKS[1])[2]}", encoding="utf-8")
        return 0
    head = ["kernel", "sm", "type", "grid", "warps", "registers", "spilled bytes", "shared bytes", "instructions"]
    print(markdown(head, []), end="")
    found = []
    for precision, architecture, batch in itertools.product(options.types, options.architectures, options.batches):
        for code in machine_code(own_launches(precision, options.filters, batch), architecture):
            found.append(code)
            cells = code.kernel, architecture, precision, code.grid, code.warps, code.registers, code.spilled_bytes
            print(f"| {' | '.join(map(str, (*cells, code.shared_bytes, code.instructions)))} |", flush=True)
    bad = sum(code.spilled_bytes > 0 for code in found)
    print(f"{len(found)} launches, {bad} of which spill registers")
    return int(bad > 0)


# Machine code


@dataclass(frozen=True)
class Code:
    """Machine code of a launch."""

    kernel: str
    grid: str
    warps: int
    programs: int
    registers: int
    """Registers of a thread; there are 255."""
    spilled_bytes: int
    """Stack and local memory of a thread."""
    shared_bytes: int
    """Shared memory of a program."""
    instructions: int
    """Instructions that a warp issues."""

    def issue_seconds(self, card: Card) -> float:
        """Return the seconds that a GPU takes to issue them all, if it never waits."""
        waves = -(-self.programs // card.multiprocessors)
        return waves * max(1.0, self.warps / SCHEDULERS) * self.instructions / card.hertz


def own_launches(precision: str, filters: Sequence[int] = REFERENCE, batch: int = 32, size: int = 128) -> list[Launch]:
    """Return the launches of our own kernels in a step of the hybrid engine. They are recorded, not run."""
    step = make_step(random_feed(torch.device("meta"), 2 * batch, size), tuple(filters), batch, precision)
    with recorded_hybrid() as found:
        step(engines.hybrid(step))
    return list(found)


@contextlib.contextmanager
def recorded_hybrid() -> Iterator[list[Launch]]:
    """Let the hybrid engine's functions be made without a GPU, and record the launches of its kernels."""
    with mock.patch.object(engines, "unavailable", return_value=""), launches.recording() as found:
        yield found


def machine_code(found: Sequence[Launch], architecture: int) -> Iterator[Code]:
    """Yield the machine code of each launch, compiled as Triton would at its first call on such a GPU."""
    from triton.runtime.driver import driver

    with mock.patch.object(driver, "_active", _pretended_driver(architecture)):
        for launch in found:
            yield _machine_code(launch)


def _machine_code(launch: Launch) -> Code:
    made = launch.kernel.warmup(**launch.arguments, grid=launch.grid, **launch.options())
    usage, listing = (
        _tool(made.asm["cubin"], *command) for command in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
    )
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Code(
        kernel=launch.kernel.__name__,
        grid="x".join(map(str, launch.grid)),
        warps=launch.warps,
        programs=launch.grid[0] * (launch.grid[1] if len(launch.grid) > 1 else 1),
        registers=numbers["REG"],
        spilled_bytes=numbers["STACK"] + numbers["LOCAL"],
        shared_bytes=made.metadata.shared,
        instructions=issued_instructions(listing, rounds(launch)),
    )


def rounds(launch: Launch) -> list[int]:
    """Return how often each loop of a kernel is run by one program, in the order of its source."""
    name, arguments, grid = launch.kernel.__name__, launch.arguments, launch.grid
    programs = -(-grid[0] // 32)  # read 32 at a time
    if name.startswith("pool"):
        tiles = -(-arguments["num_windows"] // (arguments["WINDOWS"] * grid[0]))
        if name == "pool_forward":
            return [tiles, programs, programs, tiles] if arguments["NORMALISE"] else [tiles]
        return [tiles, programs, programs, tiles, programs] if arguments["REDUCE"] else [tiles, programs]
    if name == "head_forward":
        features = arguments["PIXELS"] * arguments["CHANNELS"]
        return [-(-features // arguments["CHUNK"]), -(-arguments["NEURONS"] // arguments["COLUMNS"])]
    if name == "head_backward":
        return [-(-arguments["num_images"] // arguments["ROWS"])]  # a program runs one of its two loops
    if name == "adam_update":
        return [-(-arguments[count] // arguments["BLOCK"]) for count in ("num_checked", "num_images")]
    return []


def issued_instructions(listing: str, rounds: Sequence[int]) -> int:
    """Return the instructions that a warp issues: each loop's times its rounds, all others once.

    Loops that wait for other programs count once. Where the compiler has made more or fewer loops of them than the
    source has, all count the most rounds: too many rather than too few.
    """
    labels: dict[str, int] = {}
    found: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(found)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            found.append(instruction[1])
    loops = []
    for place, text in enumerate(found):
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", text)
        if target and target[1] in labels and labels[target[1]] < place:
            first = labels[target[1]]
            if not any("ATOM" in one for one in found[first:place]):
                loops.append((first, place))
    loops = [loop for loop in loops if not any(a <= loop[0] and loop[1] <= b and (a, b) != loop for a, b in loops)]
    while found and found[-1].startswith(("NOP", "BRA")):  # padding
        found.pop()
    each = list(rounds) if len(rounds) == len(loops) else [max(rounds, default=1)] * len(loops)
    return len(found) + sum((times - 1) * (last - first + 1) for times, (first, last) in zip(each, loops, strict=True))


def _tool(cubin: bytes, name: str, option: str) -> str:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tools / name), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _pretended_driver(architecture: int) -> Any:
    """Return what Triton asks of a GPU before it compiles."""
    from triton.backends.compiler import GPUTarget

    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", architecture, 32),
        get_active_torch_device=lambda: GPU,
        get_current_device=lambda: architecture,  # what is compiled is kept by device
        set_current_device=lambda device: None,
        get_current_stream=lambda device: 0,
    )


# Bounds


@dataclass(frozen=True)
class Bounds:
    """What a step of an engine takes at least, each by itself."""

    engine: str
    batch: int
    num_launches: int
    instruction_seconds: float
    """Of our own kernels; 0 where there are none."""
    bytes: float
    flops: float

    def seconds(self, card: Card, precision: str) -> dict[str, float]:
        """Return each bound by its name."""
        return {
            "launches": self.num_launches * LAUNCH_SECONDS,
            "instructions": self.instruction_seconds,
            "bytes": self.bytes / card.bytes_per_second,
            "matrix": self.flops / card.flop_per_second[precision],
        }


def bounds(engine: str, batch: int, precision: str = "bf16") -> Bounds:
    """Return what bounds a step of the reference network at 128 px."""
    issued = 0.0
    if engine == "hybrid":
        issued = sum(code.issue_seconds(CARDS[0]) for code in machine_code(own_launches(precision, batch=batch), 90))
    moved = passes(REFERENCE, batch=batch, element_bytes=4 if precision == "fp32" else 2)
    number = count_launches(engine, precision, batch=batch).total()
    return Bounds(engine, batch, number, issued, sum(one.bytes for one in moved), sum(one.flops for one in moved))


def bounds_table(batches: Sequence[int], precision: str = "bf16") -> str:
    """Return a table of engines, batches and cards, with a column for what a GPU measures."""
    head = ["engine", "batch", "launches", "instructions", "bytes", "matrix"]
    head += [f"{card.name} {what}" for card in CARDS for what in ("at least", "at most")] + ["measured"]
    lines = []
    for engine, batch in itertools.product(("eager", "compiled", "hybrid"), batches):
        found = bounds(engine, batch, precision)
        here = found.seconds(CARDS[0], precision)
        cells = [
            f"{found.num_launches}",
            *(f"{here[name] * 1e6:,.0f} us" for name in ("instructions", "bytes", "matrix")),
        ]
        cells[1] = cells[1] if found.instruction_seconds else "-"
        for card in CARDS:
            most = max(found.seconds(card, precision).values())
            cells += [f"{most * 1e6:,.0f} us", f"{batch / most:,.0f} images/s"]
        lines.append([f"{engine}+graphed" if engine != "eager" else "graphed", f"{batch:,}", *cells, "not measured"])
    return markdown(head, lines)


# Launches


def count_launches(
    engine: str, precision: str, augment: Sequence[str] = (), batch: int = 32, size: int = 32
) -> Counter[str]:
    """Return the launches of a step of the reference network: our own, and those of each part beside them."""
    strengths = [(name, STRENGTHS[name][0]) for name in augment]  # type: ignore[index]
    step = make_step(random_feed(torch.device("cpu"), 2 * batch, size), REFERENCE, batch, precision, strengths)
    counting = Counting()
    with pretended_gpu(), mock.patch.object(cpu_max_pool, "usable", return_value=False), recorded_hybrid() as own:
        functions = _functions(engine, step, counting.backend)
        counted: dict[str, Any] = {name: counting.under(name, getattr(functions, name)) for name in engines.FUNCTIONS}
        functions = dataclasses.replace(functions, **counted)
        step(functions)  # compiles
        counting.found.clear()
        own.clear()
        with counting:
            step(functions)
    torch._dynamo.reset()
    counting.found[OWN] = len(own)
    return counting.found


def _functions(engine: str, step: TrainingStep, backend: Any) -> StepFunctions:
    """Return an engine's functions, compiled by another compiler."""
    if engine == "compiled":
        return engines.with_compiled(step.functions, backend=backend)
    if engine == "hybrid":
        return engines.with_compiled(engines.hybrid(step), ["read"], backend)
    return step.functions


class Counting(TorchDispatchMode):
    """Counts what would be launched, by part; what happens between parts, such as the backward, is the forward's."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()
        self.part, self.compiled = "forward", False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not (self.compiled or func.is_view or name in NO_LAUNCH):
            # The gradients of a convolution's input and weight are a launch each.
            self.found[self.part] += sum(args[-1][:2]) if name == "convolution_backward" else 1
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
        number = len(CALLS.findall(code)) + code.count("torch.ops.aten.convolution_backward")

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


def compile_inductors_kernels(code: str) -> list[str]:
    """Compile the Triton kernels in `gpu_code`'s result to machine code for sm_90; return their names."""
    from torch._inductor.runtime import triton_helpers
    from triton.runtime.driver import driver

    found = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.DOTALL)
    with (
        tempfile.TemporaryDirectory() as folder,
        pretended_gpu(),
        mock.patch.object(driver, "_active", _pretended_driver(90)),
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
        torch._inductor.config.patch(compile_threads=1),  # torch 2.11's processes outlive this one by minutes
    ):
        yield


if __name__ == "__main__":
    sys.exit(main())
