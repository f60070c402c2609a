"""The fused kernels as machine code, made without a GPU: registers, spills and tensor-core instructions.

python -m bench.kernels [--types bf16 fp16 fp32] [--architectures 80 90] [--activations relu gelu ...]
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastcnn.network.small_cnn import ACTIVATIONS
from fastcnn.system.device import DTYPES

FILTERS = [(32,) * 5, (64,) * 5, (32, 64, 128, 256, 512)]
ARCHITECTURES = 80, 90


@dataclass(frozen=True)
class Code:
    """A kernel compiled for an architecture."""

    kernel: str
    architecture: int
    precision: str
    what: str
    """Shapes, tile and activation."""
    registers: int
    """A thread's, of 255."""
    spilled_bytes: int
    """Stack and local memory of a thread."""
    shared_bytes: int
    """A program's."""
    tensor_core: int
    """mma and wgmma instructions."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 1 where a kernel spills, or multiplies 16-bit values without tensor cores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--types", nargs="+", default=["bf16", "fp16", "fp32"], choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--architectures", nargs="+", type=int, default=list(ARCHITECTURES))
    parser.add_argument("--activations", nargs="+", default=list(ACTIVATIONS), choices=ACTIVATIONS)
    parser.add_argument("--quick", action="store_true", help="32x5 filters, the tiles that are used unmeasured")
    options = parser.parse_args(arguments)
    print("| kernel | sm | type | what | registers | spilled bytes | shared bytes | tensor-core instructions |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    bad = total = 0
    filters, every_tile = (FILTERS[:1], False) if options.quick else (FILTERS, True)
    for code in report(options.types, options.architectures, options.activations, filters, every_tile=every_tile):
        total += 1
        wrong = code.spilled_bytes > 0 or needs_tensor_cores(code)
        bad += wrong
        print(
            f"| {code.kernel} | {code.architecture} | {code.precision} | {code.what} | {code.registers} | "
            f"{code.spilled_bytes} | {code.shared_bytes} | {code.tensor_core} |{' WRONG' if wrong else ''}",
            flush=True,
        )
    print(f"{total} kernels, {bad} that spill or multiply 16-bit values without tensor cores")
    return bad > 0


def needs_tensor_cores(code: Code) -> bool:
    """Return whether a kernel that multiplies 16-bit values does so without tensor cores."""
    return code.precision != "fp32" and not code.kernel.startswith("finish") and not code.tensor_core


def report(
    precisions: Sequence[str],
    architectures: Sequence[int] = ARCHITECTURES,
    activations: Sequence[str] = ("relu",),
    filters: Sequence[tuple[int, ...]] = FILTERS,
    every_tile: bool = True,
) -> Iterator[Code]:
    """Yield every kernel of these networks at 128 px once, by each tile that may be chosen or by the first of them."""
    seen = set()
    for precision, activation, widths in itertools.product(precisions, activations, filters):
        for launch in launches(widths, DTYPES[precision], activation, every_tile=every_tile):
            for architecture in architectures:
                source, what = _source(launch)
                key = launch.kernel.__name__, architecture, precision, what
                if key not in seen:
                    seen.add(key)
                    yield _compiled(launch, source, what, architecture, precision)


def launches(
    filters: Sequence[int],
    dtype: torch.dtype,
    activation: str = "relu",
    batch: int = 32,
    side: int = 128,
    every_tile: bool = False,
) -> list[Any]:
    """Return what a training step with batch norm starts. Nothing is computed."""
    from fastcnn.network.kernels import autotune as launching
    from fastcnn.network.kernels import block_operators as fused

    def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    with launching.recording(every_tile) as found:
        x, moments = empty(batch, side, side, 3, kind=torch.uint8), None
        photos, moves = empty(batch, kind=torch.int64), empty(batch, 3, kind=torch.int32)
        for number, (into, out) in enumerate(zip((3, *filters), filters, strict=False)):
            weight, bias = empty(out, into, 3, 3).to(memory_format=torch.channels_last), empty(out)
            gamma = empty(into, kind=torch.float32)
            if number == 0:
                colours = empty(3, 3, kind=torch.float32)
                made = _direct(fused.first_block)(x, photos, moves, colours, weight, bias, activation, True, 1e-5)
            else:
                made = _direct(fused.block)(x, moments, gamma, gamma, weight, bias, activation, True, 1e-5)
            pooled, index, slopes, out_moments, _ = made
            gradients = pooled, out_moments
            kept = pooled, index, slopes, out_moments, activation
            if number == 0:
                _direct(fused.first_block_backward)(*gradients, x, photos, moves, colours, *kept)
            else:
                _direct(fused.block_backward)(*gradients, x, moments, gamma, gamma, weight, *kept)
            x, moments = pooled, out_moments
    return list(found)


def _direct(operator: Any) -> Any:
    """Return an operator's own function: on the device "meta" torch would call the fake one."""
    return operator._init_fn


def _source(launch: Any) -> tuple[Any, str]:
    """Return what triton compiles, and in words the shapes and the tile."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for number, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(number,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(number,)] = [["tt.divisibility", 16]]
    shown = [str(v) for v in constants.values() if isinstance(v, int) and not isinstance(v, bool)]
    names = [v.__name__ for v in constants.values() if hasattr(v, "__name__")]
    return ASTSource(launch.kernel, signature, constants, attributes), " ".join(shown + names[:1])


TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


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


if __name__ == "__main__":
    sys.exit(main())
