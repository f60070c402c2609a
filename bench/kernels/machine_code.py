"""Machine code of our own kernels: registers, spills, and the instructions that a launch issues."""

from __future__ import annotations

import contextlib
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from bench.harness.step_setup import make_step, random_feed
from bench.kernels.pretended_gpu import pretended_driver
from fastcnn.network.kernels import launch as launches
from fastcnn.network.kernels.launch import Launch
from fastcnn.training import engines

REFERENCE = (32,) * 5


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


def own_launches(precision: str, filters: Sequence[int] = REFERENCE, batch: int = 32) -> list[Launch]:
    """Return the launches of our own kernels in a step of the hybrid engine. They are recorded, not run."""
    step = make_step(random_feed(torch.device("meta"), 2 * batch, 128), tuple(filters), batch, precision)
    # In fp16 the update is torch's, which has none for tensors without a device.
    with recorded_hybrid() as found, mock.patch.object(step.optimizer, "step"):
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

    with mock.patch.object(driver, "_active", pretended_driver(architecture)):
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
        programs=math.prod(launch.grid),
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
