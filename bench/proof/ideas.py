"""Phase 2's ideas: each beside what it would replace, timed in turn."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping
from unittest import mock

import torch

from bench.harness.step_setup import random_feed, run_steps
from bench.harness.timing import clocked, repeated, steps_a_slice
from bench.proof.lines import Line, NotHere, Proof
from bench.proof.machine_and_steps import DEVICE, ON_GPU, step_of
from fastcnn.system.switches import torch_settings
from fastcnn.training import engines
from fastcnn.training.step import StepFunctions, TrainingStep

Variants = Mapping[str, Callable[[], object]]
"""Name -> what is timed."""


def batches(proof: Proof) -> tuple[int, ...]:
    """Return the batch sizes of this form."""
    return (8,) if proof.small else (32, 2048)


def ideas(proof: Proof) -> None:
    """Write each idea beside what it would replace, timed in turn."""
    for batch in batches(proof):
        for name, variants in IDEAS.items():
            work = functools.partial(_in_turn, variants, batch, small=proof.small)
            proof.measure(f"idea: {name}, batch {batch}", work, limit=90.0, least=20.0 if "compiled" in name else 8.0)


def _in_turn(variants: Callable[[int, bool], Variants], batch: int, *, small: bool) -> Line:
    """Return microseconds of each variant: the median of 7 turns, A B A B."""
    with torch_settings(DEVICE, threads=None, deterministic=False):
        runs = variants(batch, small)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        timed = {}
        for name, run in runs.items():
            count = steps_a_slice(repeated(run), 0.01 if small else 0.1, DEVICE)
            timed[name] = clocked(functools.partial(repeated(run), count), DEVICE), count
        for _ in range(7):
            for name, (run, count) in timed.items():
                seconds[name].append(run() / count)
    return {"us": {name: round(1e6 * statistics.median(found), 2) for name, found in seconds.items()}}


def _parts(batch: int, small: bool) -> Variants:
    """Whole steps, captured where there is a GPU: own kernels for nothing, the blocks, the update, both."""
    step = step_of(batch, small=small)
    try:
        ours, plain = engines.hybrid(step), step.functions
    except (engines.NoEngine, AttributeError) as error:
        raise NotHere(str(error)) from None
    blocks = dataclasses.replace(plain, read=ours.read, forward=ours.forward)
    update = dataclasses.replace(plain, collect=ours.collect, update=ours.update)
    kinds = {"plain": plain, "own blocks and head": blocks, "own update": update, "both": ours}
    return {name: _running(step, functions) for name, functions in kinds.items()}


def _running(step: TrainingStep, functions: StepFunctions) -> Callable[[], None]:
    engine = engines.graphed(step, functions) if ON_GPU else engines.Eager(step, functions)
    return lambda: run_steps(step, engine, 8)


def _meeting(batch: int, small: bool) -> Variants:
    """One launch whose programs wait for each other, and two in turn."""
    from fastcnn.network.kernels import launch

    if not hasattr(launch, "can_meet") or not launch.can_meet(DEVICE):
        raise NotHere("programs cannot wait for each other here")
    found: dict[str, Callable[[], None]] = {}
    for name, meets in (("one launch", True), ("two launches", False)):
        with mock.patch.object(launch, "can_meet", lambda device, meets=meets: meets):
            step = step_of(batch, small=small)
            found[name] = _running(step, engines.hybrid(step))
    return found


def _early(meeting: bool, batch: int, small: bool) -> Variants:
    """Launches that begin while the one before ends (programmatic dependent launch); meeting: those that meet, too.

    Two ideas, as a driver may refuse the ones that meet.
    """
    from fastcnn.network.kernels import launch

    if not ON_GPU or torch.cuda.get_device_capability(DEVICE) < (9, 0):
        raise NotHere("launches that begin early need an NVIDIA GPU of compute capability 9.0")
    found: dict[str, Callable[[], None]] = {}
    for name, early in (("in turn", False), ("early", True)):
        with mock.patch.object(launch, "starts_early", lambda one, early=early: early and (meeting or not one.meets)):
            step = step_of(batch, small=small)
            found[name] = _running(step, engines.hybrid(step))
    return found


def _compiled(batch: int, small: bool) -> Variants:
    if not ON_GPU:
        raise NotHere("compiling is for GPUs")
    step = step_of(batch, small=small)
    found = {}
    for name, parts in (("forward compiled", ["forward"]), ("all compiled", engines.FUNCTIONS)):
        functions = engines.with_compiled(step.functions, parts)
        with engines.rehearsal(step):
            step(functions)
        found[name] = _running(step, functions)
    return found


def _gathers(batch: int, small: bool) -> Variants:
    """A batch out of (M, H, W, 3) uint8: as the step does, by indexing, and in words of 16 bytes."""
    size = 32 if small else 128
    images = random_feed(DEVICE, 16 * batch, size).images
    words = images.view(len(images), -1).view(torch.complex128)
    chosen = torch.randperm(len(images), device=DEVICE)[:batch]
    return {
        "index_select": lambda: images.index_select(0, chosen),
        "indexing": lambda: images[chosen],
        "words of 16 bytes": lambda: words.index_select(0, chosen),
    }


def _channels(batch: int, small: bool) -> Variants:
    """The first convolution, forward and weight gradient, with 3 channels and with some that are zero."""
    size, dtype = 32 if small else 128, torch.bfloat16 if ON_GPU else torch.float32
    found: dict[str, Callable[[], object]] = {}
    for channels in (3, 4, 8):
        x = torch.randn(batch, channels, size, size, device=DEVICE, dtype=dtype).to(memory_format=torch.channels_last)
        conv = torch.nn.Conv2d(channels, 32, 3, padding=1, bias=False).to(DEVICE, dtype)
        conv = conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        gradient = torch.randn_like(conv(x))
        found[f"{channels} channels"] = functools.partial(
            lambda conv, x, gradient: torch.autograd.grad(conv(x), conv.weight, gradient), conv, x, gradient
        )
    return found


IDEAS: dict[str, Callable[[int, bool], Variants]] = {
    "own kernels by part": _parts,
    "one launch or two": _meeting,
    "early launches that do not meet": functools.partial(_early, False),
    "early launches": functools.partial(_early, True),
    "gathering": _gathers,
    "channels of the first convolution": _channels,
    "compiled parts": _compiled,
}
"""Idea -> (batch, small) -> its variants, the present one first."""
