"""Engines: equal to the bit where the arithmetic is the same, by gradients from equal states where it is not."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastcnn import Config, fit
from fastcnn.config import STRENGTHS
from fastcnn.data.feeds import Feed
from fastcnn.errors import FastCNNError, FastCNNWarning
from fastcnn.network.pixels import Normalise
from fastcnn.network.small_cnn import SmallCNN
from fastcnn.storage import checkpoint
from fastcnn.training import engine_choice, engines
from fastcnn.training.augment import AUGMENTATIONS, Augment, Batch
from fastcnn.training.engines import Eager, Engine, Graphed, NoEngine, rehearsal
from fastcnn.training.evaluation import EvaluationStep, Evaluator
from fastcnn.training.optimizers import OPTIMIZERS, Adam, LossScale
from fastcnn.training.parameters import FlatParameters, ordered
from fastcnn.training.schedules import average_weights, schedule
from fastcnn.training.step import StepFunctions, TrainingStep

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")
LR, DECAY, BATCH, PHOTOS = 1e-3, 0.9, 8, 60


def direct_call(steps: Callable[[], None]) -> Callable[[], None]:
    """Stands in for `cuda_graph` where there is no GPU."""
    return steps


def make_feed(count: int = PHOTOS, device: torch.device = CPU) -> Feed:
    generator = torch.Generator().manual_seed(1)
    return Feed(
        images=torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator).to(device),
        labels=torch.randint(0, 4, (count,), generator=generator).to(device),
        permutation=torch.arange(count, device=device),
        cursor=torch.zeros(1, dtype=torch.int64, device=device),
    )


def make_model(**options: Any) -> SmallCNN:
    torch.manual_seed(0)
    return SmallCNN(4, **{"filters": (4, 5, 6, 7, 8), "image_size": 32, "dense_neurons": 16, **options})


def make_step(
    num_steps: int = 50,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    feed: Feed | None = None,
    model: SmallCNN | None = None,
    **options: Any,
) -> TrainingStep:
    parameters = FlatParameters((model or make_model()).to(device), dtype)
    lr_schedule = options.pop("lr_schedule", schedule("onecycle", LR, num_steps))
    augment = make_augment(options.pop("augmentations", ()))
    return TrainingStep(
        parameters,
        Adam(parameters, LR),
        feed or make_feed(device=device),
        Normalise(MEAN, STD, 32, dtype, device),
        batch_size=BATCH,
        lr_schedule=lr_schedule,
        augment=augment,
        **options,
    )


def make_augment(names: Sequence[str]) -> Augment:
    return Augment([(name, STRENGTHS[name][0]) for name in names], 32)  # type: ignore[index]


def targets(batch: Batch) -> Tensor:
    if batch.others is None or batch.share is None:
        return batch.labels
    return torch.lerp(F.one_hot(batch.others, 4).float(), F.one_hot(batch.labels, 4).float(), batch.share[:, None])


def run_epochs(step: TrainingStep, engine: Engine, num_steps: int) -> None:
    """Run steps over as many epochs as they take, each shuffled by its number."""
    done, epoch = 0, 0
    while done < num_steps:
        epoch += 1
        step.start_epoch(7, epoch)
        portion = min(step.num_steps, num_steps - done)
        engine.run(portion)
        done += portion


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


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 100])
@pytest.mark.parametrize("name", ["constant", "cosine", "onecycle"])
def test_schedules_are_positive_rates(name: str, num_steps: int) -> None:
    rates = schedule(name, LR, num_steps)
    assert rates.shape == (num_steps,)
    assert rates.isfinite().all()
    assert (rates > 0).all()
    assert rates.max() <= LR * 1.0001


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


def test_auto_on_a_cpu_is_eager_and_says_why() -> None:
    _, name, why = engine_choice.choose(make_step(), 1000, "x")
    assert name == "eager"
    assert "CPU" in why


@pytest.mark.parametrize(("num_steps", "worth"), [(10, False), (10**9, True)])
def test_what_nobody_measured_is_tried_in_long_runs(num_steps: int, worth: bool) -> None:
    assert engine_choice.worth_building("compiled+graphed", num_steps, 4e-4, None)[0] is worth


def test_an_engine_is_worth_what_it_saves_over_the_best_so_far() -> None:
    measured = {"build_seconds": 1.0, "step_seconds": 240e-6}
    worth, why = engine_choice.worth_building("compiled+graphed", 30_000, 267e-6, measured)
    assert not worth
    assert why == "compiled+graphed took 1.0 s to build and would save 0.8 s over 30,000 steps"
    assert engine_choice.worth_building("compiled+graphed", 30_000, 400e-6, measured)[0]


def test_auto_takes_the_fastest_and_remembers_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short run after a long one knows what the long one measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seconds = {"graphed": 4e-4, "hybrid+graphed": 1e-4, "compiled+graphed": 2e-4}
    built: list[str] = []

    class Named(Eager):
        name = ""

    def named(name: str) -> Callable[[engines.Step], Engine]:
        def make(step: engines.Step) -> Engine:
            built.append(name)
            engine = Named(step)
            engine.name = name
            return engine

        return make

    for name in seconds:
        monkeypatch.setitem(engines.ENGINES, name, named(name))
    monkeypatch.setattr(engine_choice, "time_step", lambda engine, step: seconds[engine.name])

    monkeypatch.setattr(engine_choice, "on_gpu", lambda step: True)
    step = make_step()
    assert engine_choice.choose(step, 1000, "x")[1] == "graphed"
    assert built == ["graphed"]
    _, name, why = engine_choice.choose(step, 10**6, "x")
    assert name == "hybrid+graphed"
    assert "100 us a step by hybrid+graphed" in why
    assert built == ["graphed", "graphed", "hybrid+graphed", "compiled+graphed"]
    assert engine_choice.choose(step, 1000, "x")[1] == "hybrid+graphed"


@pytest.mark.parametrize(
    ("several", "num_photos", "one_by_one", "taken"),
    [(9e-5, 64, False, 8), (2e-4, 64, False, 1), (9e-5, 63, False, 1), (9e-5, 64, True, 1)],
    ids=["faster", "slower", "short epochs", "one by one"],
)
def test_auto_takes_several_steps_a_replay_where_that_was_faster(
    several: float, num_photos: int, one_by_one: bool, taken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long run tries them with the functions of the best engine; a short one by what the long one measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    step = make_step(feed=make_feed(num_photos))
    functions = dataclasses.replace(step.functions)

    def capture(step: engines.Step, functions: StepFunctions | None = None, steps_per_replay: int = 1) -> Graphed:
        return Graphed(step, functions, capture=direct_call, steps_per_replay=steps_per_replay)

    def no_engine(step: engines.Step) -> Engine:
        raise NoEngine("not here")

    def time_step(engine: Graphed, step: engines.Step) -> float:
        return several if engine.steps_per_replay > 1 else 1e-4 if engine.functions else 4e-4

    for name, make in {
        "graphed": capture,
        "hybrid+graphed": lambda step: capture(step, functions),
        "compiled+graphed": no_engine,
    }.items():
        monkeypatch.setitem(engines.ENGINES, name, make)
    monkeypatch.setattr(engine_choice, "graphed", capture)
    monkeypatch.setattr(engine_choice, "on_gpu", lambda step: True)
    monkeypatch.setattr(engine_choice, "time_step", time_step)
    for num_steps in (10**6, 10**5):
        engine, name, why = engine_choice.choose(step, num_steps, "x", one_by_one=one_by_one)
        assert isinstance(engine, Graphed)
        assert (name, engine.steps_per_replay, engine.functions) == ("hybrid+graphed", taken, functions)
        assert ("hybrid+graphed with 8 steps a replay" in why) == (num_photos == 64 and not one_by_one)


def test_steps_are_timed_after_a_first_run_and_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph's first replay brings it onto the GPU: it is not timed, and the clock runs for 50 ms or more."""
    step, runs = make_step(), []

    class Counted:
        def run(self, num_steps: int) -> None:
            runs.append(num_steps)

    clock = iter(range(10**6))
    monkeypatch.setattr(engines.time, "perf_counter", lambda: next(clock) * 0.01)  # 10 ms a run
    monkeypatch.setattr(engines, "synchronize", lambda device: None)
    assert engines.time_step(Counted(), step) == pytest.approx(0.01 / step.num_steps)
    assert runs == [step.num_steps]
    monkeypatch.setattr(engines, "on_gpu", lambda step: True)
    assert engines.time_step(Counted(), step) == pytest.approx(0.01 / step.num_steps)
    assert len(runs) == 1 + 2 + 5


def test_an_engine_history_that_is_damaged_is_no_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert engine_choice._history() == {}
    engine_choice._remember("a", "x", {"step_seconds": 0.5})
    engine_choice._remember("b", "x", {"step_seconds": 0.1})
    engine_choice._remember("b", "y", {"step_seconds": 0.2})
    assert engine_choice._history() == {
        "a": {"x": {"step_seconds": 0.5}},
        "b": {"x": {"step_seconds": 0.1}, "y": {"step_seconds": 0.2}},
    }
    engine_choice._history_file().write_text("[")
    assert engine_choice._history() == {}


def compiled_against_eager(num_states: int, activation: str, backend: str = "inductor") -> float:
    """Return the largest relative error of the compiled gradient, at states along a run."""
    step, worst = make_step(num_steps=num_states + 1, model=make_model(activation=activation)), 0.0
    other = make_step(num_steps=num_states + 1, model=make_model(activation=activation))
    functions = engines.with_compiled(other.functions, ["forward"], backend)
    for state in range(num_states):
        if state % step.num_steps == 0:
            step.start_epoch(7, state)
        for a, b in zip(other.state(), step.state(), strict=True):
            a.copy_(b)
        other.feed.permutation.copy_(step.feed.permutation)
        step()
        other(functions)
        ours, theirs = other.parameters.gradient, step.parameters.gradient
        worst = max(worst, float((ours - theirs).norm() / theirs.norm()))
    return worst


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_compiled_gradients_from_equal_states(activation: str) -> None:
    """By dynamo and autograd alone; by inductor's kernels in the long form."""
    torch._dynamo.reset()
    assert compiled_against_eager(4, activation, "aot_eager") < 1e-4
    torch._dynamo.reset()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_compiled_gradients_at_fifty_states(compiler: None, activation: str) -> None:
    worst = compiled_against_eager(50, activation)
    print(f"\nlargest relative error of the compiled gradient over 50 states, {activation}: {worst:.2g}")
    assert worst < 1e-4


PARTS = ("read", "collect", "update")
"""Those that have no backward; `forward` is above."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("optimizer", "dtype", "options"),
    [
        pytest.param(
            *("adam", torch.float32, {"augmentations": ("flip", "shift"), "clip_norm": 1.0}), marks=pytest.mark.long
        ),
        pytest.param("adamw", torch.bfloat16, {"augmentations": tuple(AUGMENTATIONS)}, marks=pytest.mark.long),
        pytest.param(
            *("sgd", torch.float32, {"class_weights": torch.tensor([0.5, 1.5, 1.0, 1.0]), "label_smoothing": 0.1}),
            marks=pytest.mark.long,
        ),
        pytest.param("adam", torch.float16, {"skip_nan": True}, marks=pytest.mark.long),
    ],
)
def test_what_a_compiler_makes_graphs_of_updates_as_the_plain_step(
    optimizer: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Eight steps, each from equal states; by dynamo and autograd alone, so in torch's own kernels."""
    torch._dynamo.reset()
    steps = [make_step(dtype=dtype, average=average_weights(DECAY, 50), **options) for _ in range(2)]
    for step in steps:
        step.optimizer = OPTIMIZERS[optimizer](step.parameters, LR, 0.05)
    functions = steps[0].functions, engines.with_compiled(steps[1].functions, PARTS, "aot_eager")
    for number in range(8):
        steps[0].feed.cursor.fill_(8 * (number % 7))
        if number == 4 and steps[0].skip_nan:
            steps[0].network.output.bias.data.fill_(float("nan"))
        for a, b in zip(steps[1].state(), steps[0].state(), strict=True):
            a.copy_(b)
        for step, own in zip(steps, functions, strict=True):
            torch.manual_seed(number)
            step(own)
        for ours, plain in zip(steps[1].state(), steps[0].state(), strict=True):
            if ours.dtype in (torch.bfloat16, torch.float16):
                assert torch.equal(ours.float().nan_to_num(), steps[1].parameters.values.to(ours.dtype).float())
            else:
                assert relative_error(ours.nan_to_num(), plain.nan_to_num()) < 1e-5
    torch._dynamo.reset()
    assert float(steps[1].skipped) == (1 if steps[1].skip_nan else 0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["plain loops", pytest.param("vectors", marks=pytest.mark.long)])
def test_compiled_parts_captured_uncaptured(compiler: None, form: str) -> None:
    """Ten steps in float64, three a replay, by inductor's kernels but for the forward's, against the plain ones."""
    results = []
    for name in ("plain", "compiled"):
        step = make_step(
            model=make_model().double(),
            dtype=torch.float64,
            augmentations=("flip", "shift"),
            clip_norm=1.0,
            average=average_weights(DECAY, 50).double(),
        )
        with fallback_random():
            functions = engines.with_compiled(step.functions, PARTS) if name == "compiled" else step.functions
            engine = Graphed(step, functions, capture=direct_call, steps_per_replay=3)
            torch.manual_seed(3)
            run_epochs(step, engine, 10)
        results.append(step.state())
    for plain, ours in zip(*results, strict=True):
        assert relative_error(ours, plain) < 1e-5  # 4e-7, of Adam's corrections, which the plain form takes in fp32


def fallback_random() -> Any:
    """Let compiled code draw the numbers that torch draws, to be compared with it."""
    import torch._inductor.config

    return torch._inductor.config.patch(fallback_random=True)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    apart, size = (ours.double() - theirs.double()).norm(), theirs.double().norm()
    return float(apart / size if size > 0 else apart)


def test_a_part_that_does_not_compile_leaves_the_step_as_it_was() -> None:
    class Untraceable(Augment):
        def __call__(self, *arguments: Any) -> Batch:
            torch._dynamo.graph_break()
            return super().__call__(*arguments)

    step = make_step(average=average_weights(DECAY, 50))
    step.augment = Untraceable([], 32)
    before, own = [tensor.clone() for tensor in step.state()], dict(vars(step))
    with pytest.warns(FastCNNWarning, match=r"no compiled engine here \(.*\): using eager"):
        _, name = engines.build("compiled", step)
    assert name == "eager"
    assert vars(step) == own
    assert all(torch.equal(a, b) for a, b in zip(step.state(), before, strict=True))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("ImportError: a.main.so: file too short\n\nSet TORCH_LOGS", r"ImportError: a\.main\.so: file too short"),
        (
            "C++ compile error\n\nCommand:\ng++ a.cpp\n\nOutput:\na.cpp:1:2: error: 'vec' is not declared\n1 | vec",
            "a.cpp:1:2.*",
        ),
    ],
)
def test_why_a_compiler_failed_is_said(message: str, said: str) -> None:
    """As where an interrupted run has left half a file in torch's cache of compiled code."""

    def fails(step: TrainingStep) -> StepFunctions:
        raise torch._dynamo.exc.BackendCompilerFailed("inductor", ImportError(message), None)

    with pytest.raises(NoEngine, match=f"^{said}$"):
        engines.engine(fails)(make_step())


@pytest.mark.filterwarnings("ignore")
def test_compiled_pooling_scatters_nothing(compiler: None) -> None:
    from torch._inductor.utils import run_and_get_code

    from fastcnn.network.kernels.cpu_max_pool import compilable_max_pool

    def loss(pool: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return pool(x * 2).square().sum()

    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    codes = []
    for pool in (compilable_max_pool, lambda x: F.max_pool2d(x, 2)):
        run = torch.compile(lambda x, pool=pool: loss(pool, x), fullgraph=True)
        result, code = run_and_get_code(lambda run=run: torch.autograd.grad(run(x), x)[0])
        codes.append("\n".join(code))
        torch.testing.assert_close(result, torch.autograd.grad(loss(pool, x), x)[0])
    assert "scatter_reduce" not in codes[0]
    # Once torch's own pooling compiles without a scatter, ours can go: pytorch #195123.
    assert "scatter_reduce" in codes[1] or not torch.__version__.startswith("2.13")


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 2, 7, 5), (2, 2, 2, 3)])
def test_compilable_pooling_is_torchs(shape: tuple[int, ...]) -> None:
    from fastcnn.network.kernels.cpu_max_pool import compilable_max_pool

    torch.manual_seed(0)
    x = torch.randn(shape).round(decimals=1)
    x.requires_grad_()
    ours, theirs = compilable_max_pool(x), F.max_pool2d(x, 2)
    assert torch.equal(ours, theirs)
    g = torch.randn_like(ours)
    assert torch.equal(torch.autograd.grad(ours, x, g)[0], torch.autograd.grad(theirs, x, g)[0])


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


def test_the_first_bad_loss_freezes_the_weights() -> None:
    step = make_step()
    step()
    values = step.parameters.values.clone()
    step.parameters.model.output.bias.data[0] = float("nan")
    before = step.parameters.values.clone()
    for _ in range(3):
        step()
    assert float(step.skipped) == 3
    assert float(step.optimizer.num_updates) == 1
    assert torch.equal(step.parameters.values.nan_to_num(9), before.nan_to_num(9))
    assert not torch.equal(values, before)


def test_a_run_that_diverges_says_where(photos: Path) -> None:
    config = Config(data=str(photos), epochs=2, image_size=32, filters=(8,), batch_size=16, lr=1e30)
    with pytest.raises(
        FastCNNError, match=r"the loss of step \d+ \(epoch \d\) is not a finite number.* try a lower --lr"
    ):
        fit(config)


def test_loss_scale() -> None:
    scale = LossScale(CPU, interval=3)
    zero, one = torch.zeros(()), torch.ones(())
    scale.update(one)
    assert float(scale.scale) == 2.0**15
    for _ in range(3):
        scale.update(zero)
    assert float(scale.scale) == 2.0**16
    scale.update(zero)
    scale.update(one)
    for _ in range(2):
        scale.update(zero)
    assert float(scale.scale) == 2.0**15


def test_fp16_skips_an_overflow_and_learns_on() -> None:
    step = make_step(dtype=torch.float16, lr_schedule=torch.full((50,), LR))
    assert step.loss_scale is not None
    step.loss_scale.scale.fill_(2.0**40)
    values = step.parameters.values.clone()
    step()
    assert torch.equal(step.parameters.values, values)
    assert float(step.loss_scale.scale) == 2.0**39
    step.loss_scale.scale.fill_(2.0**8)
    step()
    assert not torch.equal(step.parameters.values, values)
    assert float(step.skipped) == 0
    assert float(step.optimizer.num_updates) == 1


def test_augmentations() -> None:
    images = make_feed().images
    photos, labels = torch.arange(PHOTOS), make_feed().labels
    flip, shift = make_augment(["flip"]), make_augment(["shift"])
    flipped = flip(images, photos, labels, flip.draw(PHOTOS, (0, 1))).images
    mirrored = (flipped == images.flip(2)).flatten(1).all(1)
    same = (flipped == images).flatten(1).all(1)
    assert (mirrored | same).all()
    assert 10 < mirrored.sum() < 50
    shifted = shift(images, photos, labels, shift.draw(PHOTOS, (0, 1))).images
    assert shifted.shape == images.shape
    assert shifted.dtype == torch.uint8
    inside = shifted[:, 8:24, 8:24]
    found = [
        any(
            torch.equal(inside[i], images[i, 8 + dy : 24 + dy, 8 + dx : 24 + dx])
            for dy in range(-2, 3)
            for dx in range(-2, 3)
        )
        for i in range(len(images))
    ]
    assert all(found)


def test_the_average_is_what_is_evaluated_and_kept(photos: Path) -> None:
    config = Config(
        data=str(photos), epochs=2, image_size=32, filters=(8,), batch_size=16, ema=0.9, schedule="cosine",
        augment=("flip", "shift"), clip_norm=1.0, precision="fp32", report=False,
    )  # fmt: skip
    run = fit(config)
    last, best = (checkpoint.load(run.run_dir / name) for name in ("last.pt", "best.pt"))
    bias = last["model"]["blocks.4.norm.bias"]  # the buffer's end
    average = last["average"][-len(bias) :]
    assert not torch.equal(bias, average)
    if best["epoch"] == last["epoch"]:
        assert torch.equal(best["model"]["blocks.4.norm.bias"], average)


def test_runs_in_one_process_do_not_touch_each_other(photos: Path) -> None:
    config = Config(
        data=str(photos), epochs=2, image_size=32, filters=(8,), batch_size=16, deterministic=True, report=False
    )
    first = checkpoint.load(fit(config).run_dir / "last.pt")["model"]
    other = {"image_size": 48, "filters": (4,), "batch_size": 24, "activation": "gelu", "dropout": 0.2}
    fit(Config(data=str(photos), epochs=1, report=False, **other))  # type: ignore[arg-type]
    again = checkpoint.load(fit(config).run_dir / "last.pt")["model"]
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.long
def test_memory_over_runs_is_flat(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcnn.reporting.plots.png", lambda *_: b"")  # seconds a run, and no tensors
    config = Config(data=str(photos), epochs=1, image_size=32, filters=(8,), batch_size=16)

    def tensors() -> int:
        gc.collect()
        return sum(t.untyped_storage().nbytes() for t in gc.get_objects() if issubclass(type(t), Tensor))

    fit(config)
    used = []
    for _ in range(3):
        fit(config)
        used.append(tensors())
    assert used[-1] <= used[0] + 100_000


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
