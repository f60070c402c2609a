"""The training step: images a second by engine, batch, filters and precision, over plain loops on the same shapes.

Beside the rates stand their shares: FLOP/s over the machine's matrix rate, bytes/s over its copy bandwidth, both
measured in this process, and time over the counted floor (`harness/roofline.py`).
Compiling and capturing are apart, as `build_seconds`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from bench.harness import machine
from bench.harness.race import SCALES, Race
from bench.harness.roofline import floor_seconds, passes
from bench.harness.step_setup import make_step, num_images, random_feed, run_steps
from bench.harness.timing import Apart, RivalFailed, steps_a_slice
from fastcnn.system.device import pick_precision
from fastcnn.training import engines
from fastcnn.training.engine_choice import STEPS_PER_REPLAY

ENGINES: dict[str, Callable[[engines.Step], engines.Engine]] = {
    **engines.ENGINES,
    **{
        f"{name}, {STEPS_PER_REPLAY} a replay": engines.engine(
            build, functools.partial(engines.graphed, steps_per_replay=STEPS_PER_REPLAY)
        )
        for name, build in (("graphed", lambda step: step.functions), ("hybrid+graphed", engines.hybrid))
    },
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """List the combinations, the reference first: where time runs out, what is left is the least asked for."""
    device, name = torch.device(metafunc.config.getoption("--device")), metafunc.config.getoption("--scale")
    best = pick_precision("auto", device, deterministic=False, strict=False)
    networks, batches = SCALES[name]["networks"], SCALES[name]["batches"]
    if device.type == "cuda":
        precisions = ["bf16", "fp16", "fp32"] if name == "full" else [best]
        shapes = list(itertools.product(precisions, networks, batches, ENGINES))
    else:  # one thing changed at a time: all combinations would take a CPU hours
        reference = (best, networks[0], batches[0], "eager")
        shapes = [reference, *((best, networks[0], batch, "eager") for batch in batches[1:2])]
        shapes += [(best, network, batches[0], "eager") for network in networks[1:]]
        if name == "full":
            shapes += [("fp32", networks[0], batches[0], "eager"), (best, networks[0], batches[0], "compiled")]
    metafunc.parametrize(("precision", "filters", "batch", "engine"), list(dict.fromkeys(shapes)))


Rivals = Callable[[int, tuple[int, ...], int, str], dict[str, Apart]]
"""(image size, filters, batch, precision) -> name -> what does some of a loop's steps and returns their seconds."""


@pytest.fixture(scope="module")
def rivals(device: torch.device) -> Iterator[Rivals]:
    """The loops to race against, in processes with the settings they come with; kept until the shapes change."""
    kept: dict[tuple[object, ...], dict[str, Apart]] = {}
    with contextlib.ExitStack() as stack:

        def on(size: int, filters: tuple[int, ...], batch: int, precision: str) -> dict[str, Apart]:
            shape = size, filters, batch, precision
            if shape not in kept:
                stack.close()
                kept.clear()
                kept[shape] = {}
                for name, (loop, kind) in loops(precision, on_gpu=device.type == "cuda").items():
                    run = Apart("bench.baselines.loops:random_steps", loop, max(512, 2 * batch), *shape[:3], kind)
                    kept[shape][name] = stack.enter_context(contextlib.closing(run))
                    with contextlib.suppress(RivalFailed):  # the race leaves it out, and says why
                        run(3)  # compiles
            return kept[shape]

        yield on


def loops(precision: str, *, on_gpu: bool) -> dict[str, tuple[str, str]]:
    """Return the loops to race against: name -> key of `loops.LOOPS`, and precision."""
    found = {"plain fp32 loop": ("plain", "fp32"), "cached fp32 loop": ("cached", "fp32")}
    if precision != "fp32":
        found[f"plain {precision} loop"] = ("plain", precision)
    elif on_gpu:
        found["plain tf32 loop"] = ("plain", "tf32")
    return found | ({f"max-autotune {precision} loop": ("max-autotune", precision)} if on_gpu else {})


def bench_engine(race: Race, rivals: Rivals, precision: str, filters: tuple[int, ...], batch: int, engine: str) -> None:
    """Ours."""
    device, size, rounds = race.device, race.scale["image_size"], race.scale["rounds"]
    step = make_step(random_feed(device, num_images(device, batch), size), filters, batch, precision)
    start = time.perf_counter()
    try:
        runner = ENGINES[engine](step)
    except engines.NoEngine as error:
        pytest.skip(str(error))
    build_seconds = time.perf_counter() - start
    num_steps = steps_a_slice(functools.partial(run_steps, step, runner), race.scale["slice_seconds"], device)
    step.sums.reset()
    seconds = race(
        f"{engine}, {precision}, {','.join(map(str, filters))}, batch {batch}",
        lambda: run_steps(step, runner, num_steps),
        {name: functools.partial(run, num_steps) for name, run in rivals(size, filters, batch, precision).items()},
        images=batch * num_steps,
        engine=engine,
        precision=precision,
        filters=list(filters),
        batch=batch,
        build_seconds=build_seconds,
    )
    score = step.sums.read()
    assert score.count == batch * num_steps * (rounds + 1)
    assert math.isfinite(score.loss)
    race.note(**shares(filters, batch, size, precision, statistics.median(seconds) / num_steps, device))


def shares(
    filters: tuple[int, ...], batch: int, size: int, precision: str, seconds: float, device: torch.device
) -> dict[str, float]:
    """Return a step's FLOP/s and bytes/s as shares of the machine's own rates, and the counted floor's of its time."""
    rates = machine.rates(device)
    counted = passes(filters, batch=batch, image_size=size, element_bytes=4 if precision == "fp32" else 2)
    matrix = rates["fp32_flop_per_second" if precision == "fp32" else "bf16_flop_per_second"]
    flops, moved = sum(one.flops for one in counted), sum(one.bytes for one in counted)
    return {
        "step_seconds": seconds,
        "flops": flops,
        "bytes": moved,
        "share_of_matrix_rate": flops / seconds / matrix,
        "share_of_copy_bandwidth": moved / seconds / rates["copy_bytes_per_second"],
        "share_of_floor": floor_seconds(counted, rates["copy_bytes_per_second"], matrix) / seconds,
    }
