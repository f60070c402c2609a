"""Engines: each trains as a plain loop does, eagerly or captured."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastcnn.errors import FastCNNError, FastCNNWarning
from fastcnn.training import engines
from fastcnn.training.augment import AUGMENTATIONS
from fastcnn.training.engines import Eager, Engine, Graphed, NoEngine, rehearsal
from fastcnn.training.evaluation import EvaluationStep, Evaluator
from fastcnn.training.parameters import ordered
from fastcnn.training.schedules import average_weights
from tests.training.steps import (
    BATCH,
    DECAY,
    LR,
    PHOTOS,
    direct_call,
    make_augment,
    make_feed,
    make_model,
    make_step,
    run_epochs,
    targets,
)


@pytest.mark.parametrize(
    ("augmentations", "dropout", "steps_per_replay"),
    [
        (tuple(AUGMENTATIONS), 0.4, 3),
        *(
            pytest.param(augmentations, dropout, steps, marks=pytest.mark.long)
            for augmentations in ((), tuple(AUGMENTATIONS))
            for dropout in (0.0, 0.4)
            for steps in (1, 3)
        ),
    ],
)
def test_fifty_steps_equal_a_plain_loop_to_the_bit(
    augmentations: tuple[str, ...], dropout: float, steps_per_replay: int
) -> None:
    """The graphed engine run uncaptured, across epochs' ends, with a schedule and an average, against a loop."""
    generator = torch.Generator()
    step = make_step(
        model=make_model(dropout=dropout),
        generator=generator,
        augmentations=augmentations,
        clip_norm=1.0,
        average=average_weights(DECAY, 50),
    )
    engine = Graphed(step, capture=direct_call, steps_per_replay=steps_per_replay)
    generator.manual_seed(5)
    run_epochs(step, engine, 50)

    feed, model = make_feed(), make_model(dropout=dropout)
    names = [name for name, _ in model.named_parameters()]
    parameters = [p for _, p in ordered(model)]
    flat = torch.cat([memory_order(p) for p in parameters])
    average = flat.clone()
    optimizer = torch.optim.Adam([flat], lr=torch.tensor(LR), fused=True)
    peak = 0.3 * 50 - 1
    torch.manual_seed(5)
    number, total, right = 0, 0.0, 0
    for epoch in range(1, 9):
        order = np.random.default_rng([7, epoch]).permutation(PHOTOS)
        augment = make_augment(augmentations)
        draws = augment.draw(PHOTOS, (7, epoch))
        for start in range(0, PHOTOS - BATCH + 1, BATCH):
            if number == 50:
                break
            batch = torch.from_numpy(order[start : start + BATCH])
            changed = augment(feed.images, batch, feed.labels[batch], draws[:, start : start + BATCH])
            logits = model(step.normalise(changed.images))
            loss = F.cross_entropy(logits, targets(changed), reduction="none")
            model.zero_grad()
            loss.mean().backward()
            flat.grad = torch.cat([memory_order(gradient(p)) for p in parameters])
            flat.grad *= (1.0 / (flat.grad.norm() + 1e-6)).clamp(max=1)
            for group in optimizer.param_groups:
                group["lr"].fill_(one_cycle(number, peak, 50))
            optimizer.step()
            spread_out(flat, parameters)
            average = torch.lerp(average, flat, torch.tensor(1 - min(DECAY, (1 + number) / (10 + number))))
            number += 1
            total, right = (
                total + loss.detach().double().sum().item(),
                right + int((logits.argmax(1) == feed.labels[batch]).sum()),
            )
    assert number == 50
    for name, ours, theirs in zip(names, step.parameters.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    for ours, theirs in zip(step.parameters.model.buffers(), model.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert step.average is not None
    assert torch.equal(step.average, average)
    score = step.sums.read()
    assert score.count == 50 * BATCH
    assert score.loss == pytest.approx(total / score.count, rel=1e-5)
    assert score.accuracy == pytest.approx(right / score.count)


def memory_order(tensor: Tensor) -> Tensor:
    return (tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor).detach().reshape(-1)


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.to(memory_format=torch.channels_last) if parameter.dim() == 4 else parameter.grad


def spread_out(flat: Tensor, parameters: list[torch.nn.Parameter]) -> None:
    with torch.no_grad():
        for p, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            if p.dim() == 4:
                out, into, height, width = p.shape
                p.copy_(piece.view(out, height, width, into).permute(0, 3, 1, 2))
            else:
                p.copy_(piece.view(p.shape))


def one_cycle(number: int, peak: float, total: int) -> float:
    if number <= peak:
        low, high, share = LR / 25, LR, number / peak
        return high + (low - high) / 2 * (1 + math.cos(math.pi * share))
    high, low, share = LR, LR / 25e4, (number - peak) / (total - 1 - peak)
    return low + (high - low) / 2 * (1 + math.cos(math.pi * share))


class NoSync(TorchDispatchMode):
    """Fails on what waits for the device, or has a size that depends on data."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(word in str(func) for word in ("_local_scalar_dense", "nonzero", "item")), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_a_step_neither_synchronises_nor_keeps_memory(kind: str) -> None:
    training = make_step(augmentations=tuple(AUGMENTATIONS), clip_norm=1.0, average=average_weights(DECAY, 50))
    model, feed = training.parameters.model, training.feed
    step = training if kind == "training" else EvaluationStep(model, feed, training.normalise, BATCH)
    for _ in range(2):
        step()

    def alive() -> set[int]:
        gc.collect()
        things = gc.get_objects()
        tensors = [thing for thing in things if issubclass(type(thing), Tensor) and not isinstance(thing, FakeTensor)]
        return {tensor.untyped_storage().data_ptr() for tensor in tensors}

    pointers = [tensor.data_ptr() for tensor in step.state()]
    before = alive()
    with NoSync():
        for _ in range(3):
            step()
    assert alive() <= before
    assert [tensor.data_ptr() for tensor in step.state()] == pointers


def test_making_an_engine_changes_nothing() -> None:
    step = make_step(
        model=make_model(dropout=0.5),
        generator=torch.Generator(),
        augmentations=("flip",),
        average=average_weights(DECAY, 50),
    )
    assert step.generator
    before, rng = [tensor.clone() for tensor in step.state()], step.generator.get_state()
    Graphed(step, capture=direct_call, steps_per_replay=2)
    engines.time_step(Eager(step), step)
    assert all(torch.equal(a, b) for a, b in zip(step.state(), before, strict=True))
    assert torch.equal(step.generator.get_state(), rng)


def test_state_lists_all_that_a_step_changes() -> None:
    """A step repeated from a restored state does the same: nothing that matters is missing from the list."""
    step = make_step(
        model=make_model(dropout=0.5),
        generator=torch.Generator(),
        average=average_weights(DECAY, 50),
        dtype=torch.bfloat16,
    )
    with rehearsal(step):
        step()
        step()
        first = [tensor.clone() for tensor in step.state()]
    step()
    step()
    assert all(torch.equal(a, b) for a, b in zip(step.state(), first, strict=True))


def test_a_changed_learning_rate_takes_effect_on_replay() -> None:
    step = make_step(lr_schedule=torch.full((50,), LR))
    engine = Graphed(step, capture=direct_call)
    engine.run(1)
    before = step.parameters.values.clone()
    step.lr_schedule.zero_()
    engine.run(1)
    assert torch.equal(step.parameters.values, before)
    step.lr_schedule.fill_(LR)
    engine.run(1)
    assert not torch.equal(step.parameters.values, before)


def test_a_failed_capture_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(steps: Callable[[], None]) -> Callable[[], None]:
        steps()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    def graphed(step: engines.Step) -> Engine:
        try:
            return Graphed(step, capture=refused)
        except RuntimeError as error:
            raise NoEngine(str(error).splitlines()[0]) from None

    monkeypatch.setitem(engines.ENGINES, "graphed", graphed)
    step = make_step()
    before = [tensor.clone() for tensor in step.state()]
    with pytest.warns(FastCNNWarning, match="no graphed engine here .*not permitted.*using eager"):
        engine, name = engines.build("graphed", step)
    assert name == "eager"
    assert isinstance(engine, Eager)
    assert all(torch.equal(a, b) for a, b in zip(step.state(), before, strict=True))
    with pytest.raises(FastCNNError, match="--strict"):
        engines.build("graphed", step, strict=True)


def test_after_a_failed_capture_nothing_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch 2.12 it counts as under way: eager is next, and what no longer runs at all is one line."""

    def refused(step: engines.Step) -> Engine:
        raise NoEngine("out of something")

    for name in ("hybrid+graphed", "graphed"):
        monkeypatch.setitem(engines.ENGINES, name, refused)
    with pytest.warns(FastCNNWarning) as told:
        assert engines.build("hybrid+graphed", make_step())[1] == "eager"
    assert [str(one.message).rpartition("using ")[2] for one in told] == ["graphed", "eager"]
    monkeypatch.setattr(engines, "_capture_under_way", lambda: True)
    with pytest.warns(FastCNNWarning, match="using eager"):
        assert engines.build("hybrid+graphed", make_step())[1] == "eager"
    step = make_step()
    monkeypatch.setattr(step, "read", lambda: step.one_hot.view(-1, 7))
    with pytest.warns(FastCNNWarning), pytest.raises(FastCNNError, match="run again with --engine eager"):
        engines.build("graphed", step)


def test_a_side_stream_is_joined_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[tuple[str, str]] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            waits.append((self.name, other.name))

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("current"))
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    with pytest.raises(RuntimeError, match="no memory"), engines._side_stream(torch.device("cuda")):
        raise RuntimeError("no memory")
    assert waits == [("side", "current"), ("current", "side")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_graphs_without_a_gpu_are_a_warning() -> None:
    with pytest.warns(FastCNNWarning, match="need an NVIDIA GPU"):
        assert engines.build("graphed", make_step())[1] == "eager"


def test_evaluation_by_graph_and_by_call(compiler: None) -> None:
    step = make_step()
    model = step.parameters.compute
    plain = Evaluator(model, make_feed(37), step.normalise)()
    graph = Evaluator(
        model, make_feed(37), step.normalise, lambda s: Graphed(s, capture=direct_call, steps_per_replay=2)
    )()
    assert plain.score == graph.score
    assert plain.score.count == 37
    assert torch.equal(plain.predicted, graph.predicted)


@pytest.mark.cuda
@pytest.mark.parametrize("augmentations", [(), tuple(AUGMENTATIONS)])
def test_graphed_equals_eager_on_a_gpu(augmentations: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, with deterministic kernels."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    device, results = torch.device("cuda"), []
    for name in ("eager", "graphed"):
        step = make_step(device=device, augmentations=augmentations, average=average_weights(DECAY, 50))
        torch.cuda.manual_seed(3)
        engine, used = engines.build(name, step, strict=True)
        assert used == name
        run_epochs(step, engine, 50)
        results.append([tensor.clone() for tensor in step.state()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("name", [name for name in engines.ENGINES if name != "eager" and "hybrid" not in name])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_engine_learns_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    step = make_step(num_steps=200, device=torch.device("cuda"), dtype=dtype)
    engine, used = engines.build(name, step, strict=True)
    assert used == name
    run_epochs(step, engine, step.num_steps)
    first = step.sums.read().loss
    run_epochs(step, engine, 180)
    step.sums.reset()
    run_epochs(step, engine, step.num_steps)
    assert step.sums.read().loss < 0.8 * first
