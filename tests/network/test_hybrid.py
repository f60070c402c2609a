"""Kernels around the convolutions against float64: on a GPU where there is one, else by Triton's interpreter."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn.network import hybrid_forward
from fastcnn.network.small_cnn import ACTIVATIONS, MONOTONE
from fastcnn.training import engines, written_update
from fastcnn.training.engines import NoEngine
from fastcnn.training.evaluation import Evaluator
from fastcnn.training.optimizers import OPTIMIZERS
from fastcnn.training.schedules import average_weights
from fastcnn.training.step import TrainingStep
from tests.training.steps import DECAY, LR, make_feed, make_model, make_step, relative_error, run_epochs

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastcnn.network.kernels import activations, launch
from fastcnn.network.kernels import pool_norm as kernels
from fastcnn.network.kernels.head_layer import Loss, head
from fastcnn.network.kernels.pool_norm_layer import Norm, new_counters, pool_norm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KINDS = [torch.float32, torch.bfloat16, torch.float16]
ORDERS = ["in turn", "reversed", "shuffled"]


@pytest.fixture(scope="module", autouse=True)
def _quicker_interpreter() -> Iterator[None]:
    """Spare the interpreter what takes it most of its time and is not about the kernels.

    It asks whether whole numbers overflow, and replaces the functions of `tl` anew at each call of a helper, though the
    launch has done so.
    """
    from triton.runtime import interpreter

    builder, replace, replaced = interpreter.interpreter_builder, interpreter._patch_lang, contextlib.ExitStack()
    replaced.restore = lambda: None  # type: ignore[attr-defined]

    def replace_once(kernel: Any) -> Any:
        modules = [module for module in kernel.__globals__.values() if module is tl or module is tl.core]
        return replace(kernel) if any(tl.core.is_builtin(module.load) for module in modules) else replaced

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        patch.setattr(interpreter, "_patch_lang", replace_once)
        yield


@pytest.fixture
def _poisoned() -> Iterator[None]:
    """Fill what torch allocates with NaN, so that a value that no kernel wrote is found."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def run_programs(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter run the programs of each launch in another order: a race gives another result."""
    from triton.runtime.interpreter import interpreter_builder as builder

    set_grid_dim, set_grid_idx = builder.set_grid_dim, builder.set_grid_idx
    programs: list[tuple[int, ...]] = []

    def grid(*sizes: int) -> None:
        set_grid_dim(*sizes)
        programs[:] = itertools.product(*map(range, sizes))
        if order == "reversed":
            programs.reverse()
        elif order == "shuffled":
            random.Random(len(programs)).shuffle(programs)

    monkeypatch.setattr(builder, "set_grid_dim", grid)
    monkeypatch.setattr(builder, "set_grid_idx", lambda *_: set_grid_idx(*programs.pop(0)))


def test_every_activation_is_there() -> None:
    assert set(activations.ACTIVATIONS) == set(ACTIVATIONS)
    assert {name for name, one in activations.ACTIVATIONS.items() if one.monotone} == MONOTONE


class Case:
    """A function of random shape, input and arithmetic, with its gradients."""

    leaves: dict[str, Tensor]
    upstream: Tensor

    def __init__(self, seed: int) -> None:
        self.pick, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.kind = KINDS[seed % 3]
        self.activation = list(ACTIVATIONS)[self.pick.randrange(len(ACTIVATIONS))]

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def ours(self, leaves: dict[str, Tensor]) -> Tensor:
        """Return the result of the kernels."""
        raise NotImplementedError

    def plain(self, leaves: dict[str, Tensor]) -> Tensor:
        """Return the result by torch, in the arithmetic of the leaves."""
        raise NotImplementedError

    def results(self, plain: bool, kind: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return the result and all gradients, on the CPU."""
        on = torch.device("cpu") if plain else DEVICE
        leaves = {k: v.to(on, kind or v.dtype).detach().requires_grad_() for k, v in self.leaves.items()}
        result = self.plain(leaves) if plain else self.ours(leaves)
        gradients = torch.autograd.grad(result, list(leaves.values()), self.upstream.to(result))
        return {k: v.detach().cpu() for k, v in zip(["result", *leaves], [result, *gradients], strict=True)}

    def check(self) -> float:
        """Return the largest error against float64; assert that it is about that of torch in the same arithmetic."""
        exact, torchs, ours = self.results(True, torch.float64), self.results(True), self.results(False)
        assert all(value.isfinite().all() for value in ours.values()), str(self)
        errors = {name: relative_error(ours[name], exact[name]) for name in exact}
        allowed = 1e-5 if self.kind == torch.float32 else 1e-2
        for name, found in errors.items():
            assert found < max(allowed, 1.2 * relative_error(torchs[name], exact[name])), f"{self}: {name} {found:.1e}"
        return max(errors.values())

    def __str__(self) -> str:
        shapes = {name: tuple(value.shape) for name, value in self.leaves.items()}
        return f"{type(self).__name__} {self.kind} {self.activation} {shapes}"


class PoolCase(Case):
    """What follows a convolution."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        channels = self.pick.choice([5, 16, 24, 70])
        count, height, width = self.pick.randint(1, 4), self.pick.randint(1, 6), self.pick.randint(1, 6)
        pattern = self.pick.choice(["random", "random", "constant", "ties"])
        sums = self.draw(count, channels, 2 * height, 2 * width)
        if pattern == "constant":
            sums[:] = sums[:1, :, :1, :1] * 1000
        if pattern == "ties":
            sums = (sums * 2).round() / 2
        self.leaves = {
            "sums": sums.to(self.kind).to(memory_format=torch.channels_last),
            "bias": (self.draw(channels) / 2).to(self.kind),
        }
        self.norm = self.pick.random() < 0.7 and pattern != "constant"
        if self.norm:
            self.leaves |= {"gamma": self.draw(channels) + 1, "beta": self.draw(channels)}
            self.leaves["gamma"][:3] = torch.tensor([0.0, -1.0, 5.0])
        self.upstream = self.draw(count, channels, height, width).to(self.kind)
        self.statistics: dict[bool, list[Tensor]] = {}

    def running(self, plain: bool, like: Tensor) -> list[Tensor]:
        kind = torch.float64 if like.dtype == torch.float64 else torch.float32
        channels = len(self.leaves["bias"])
        self.statistics[plain and kind == torch.float64] = found = [
            torch.full((channels,), value, dtype=kind, device=like.device) for value in (0.5, 2.0)
        ]
        return found

    def ours(self, leaves: dict[str, Tensor]) -> Tensor:
        norm = None
        if self.norm:
            norm = Norm(leaves["gamma"], leaves["beta"], *self.running(False, leaves["sums"]), 0.1, 1e-5)
        return pool_norm(leaves["sums"], leaves["bias"], self.activation, norm, new_counters(DEVICE))

    def plain(self, leaves: dict[str, Tensor]) -> Tensor:
        """Pools before a monotone activation: ties that it makes are none before it."""
        activation = ACTIVATIONS[self.activation]()
        x = leaves["sums"] + leaves["bias"][:, None, None]
        y = activation(F.max_pool2d(x, 2)) if self.activation in MONOTONE else F.max_pool2d(activation(x), 2)
        if self.norm:
            running = self.running(True, y)
            y = F.batch_norm(y, *running, leaves["gamma"], leaves["beta"], True, 0.1, 1e-5)
        return y

    def check(self) -> float:
        worst = super().check()
        if self.norm:
            for ours, exact in zip(self.statistics[False], self.statistics[True], strict=True):
                assert relative_error(ours.cpu(), exact) < (1e-6 if self.kind == torch.float32 else 1e-3), str(self)
        return worst


class HeadCase(Case):
    """Dense layers and cross-entropy."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        count, channels, side = self.pick.randint(1, 40), self.pick.choice([8, 24]), self.pick.choice([1, 2])
        neurons, self.classes = self.pick.choice([16, 40]), self.pick.choice([2, 10, 17])
        features = channels * side * side
        self.leaves = {
            "x": self.draw(count, channels, side, side).to(memory_format=torch.channels_last),
            "dense": self.draw(neurons, features) / features**0.5,
            "dense_bias": self.draw(neurons),
            "output": self.draw(self.classes, neurons) / neurons**0.5,
            "output_bias": self.draw(self.classes),
        }
        self.leaves = {name: value.to(self.kind) for name, value in self.leaves.items()}
        self.upstream = self.draw(count).abs()
        soft = self.pick.random() < 0.5
        targets = torch.randint(0, self.classes, (count,), generator=self.generator)
        weights = self.draw(self.classes).abs() + 0.1 if self.pick.random() < 0.5 else None
        self.loss = Loss(self.draw(count, self.classes).softmax(1) if soft else targets, seed % 2 / 10, weights)
        self.dropped = F.dropout(torch.ones(count, neurons, dtype=self.kind), 0.3) if self.pick.random() < 0.5 else None

    def ours(self, leaves: dict[str, Tensor]) -> Tensor:
        dense, output = (nn.Linear(1, 1, device="meta") for _ in range(2))
        for layer, name in ((dense, "dense"), (output, "output")):
            del layer.weight, layer.bias
            layer.weight, layer.bias = leaves[name], leaves[f"{name}_bias"]  # type: ignore[assignment]
        loss = Loss(*(one.to(DEVICE) if isinstance(one, Tensor) else one for one in self.loss))
        dropped = None if self.dropped is None else self.dropped.to(DEVICE)
        losses, self.found = head(leaves["x"], dense, output, self.activation, dropped, loss, new_counters(DEVICE))
        return losses

    def plain(self, leaves: dict[str, Tensor]) -> Tensor:
        x = ACTIVATIONS[self.activation]()(F.linear(leaves["x"].flatten(1), leaves["dense"], leaves["dense_bias"]))
        x = x if self.dropped is None else x * self.dropped.to(x.dtype)
        logits = F.linear(x, leaves["output"], leaves["output_bias"])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets, smoothing, weights = self.loss
        self.likely = logits.detach().argmax(1)
        targets = targets.to(logits.dtype) if targets.is_floating_point() else targets
        weights = None if weights is None else weights.to(logits.dtype)
        return F.cross_entropy(logits, targets, weight=weights, reduction="none", label_smoothing=smoothing)

    def check(self) -> float:
        worst = super().check()
        if self.kind == torch.float32:
            assert torch.equal(self.found.cpu(), self.likely)
        return worst


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("case", [PoolCase, HeadCase])
@pytest.mark.parametrize("seed", range(12))
def test_kernels_against_float64(case: type[Case], seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        run_programs(ORDERS[seed % 3], monkeypatch)
    case(seed).check()


@pytest.mark.long
@pytest.mark.usefixtures("_poisoned")
def test_three_hundred_cases_against_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        run_programs("shuffled", monkeypatch)
    worst = dict.fromkeys(KINDS, 0.0)
    for seed in range(100, 400):
        case = (PoolCase if seed % 2 else HeadCase)(seed)
        worst[case.kind] = max(worst[case.kind], case.check())
    print(f"\nlargest relative errors of 300 cases: { {str(k): f'{v:.1e}' for k, v in worst.items()} }")


@pytest.mark.parametrize("order", ["reversed", pytest.param("shuffled", marks=pytest.mark.long)])
def test_the_order_of_programs_changes_no_bit(order: str) -> None:
    if DEVICE.type == "cuda":
        pytest.skip("a GPU has an order of its own")
    found = []
    for one in ("in turn", order):
        with pytest.MonkeyPatch.context() as patch:
            run_programs(one, patch)
            found.append(one_step(hybrid_step(dtype=torch.bfloat16, average=average_weights(DECAY, 50))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def hybrid_step(**options: Any) -> TrainingStep:
    network = {"filters": (16,) * 5, **options.pop("network", {})}
    step = make_step(model=make_model(**network), device=DEVICE, **options)
    step.start_epoch(7, 1)
    return step


def one_step(step: TrainingStep) -> list[Tensor]:
    """Return the state after a step by the hybrid engine's functions; the step is as before."""
    with engines.rehearsal(step):
        torch.manual_seed(1)
        step(engines.hybrid(step))
        return [tensor.clone() for tensor in step.state()]


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {
        "augmentations": ("flip", "shift", "mixup"),
        "label_smoothing": 0.1,
        "class_weights": torch.tensor([0.5, 1.5, 1.0, 1.0]),
        "average": average_weights(DECAY, 50),
        "network": {"dropout": 0.4, "activation": "gelu"},
    },
    "no norm": {"network": {"batch_norm": False, "kernel_size": 5, "activation": "mish"}},
    "torch's update": {"clip_norm": 1.0, "skip_nan": True, "network": {"filters": (8, 5, 6, 7, 8)}},
    "a wide head": {"network": {"dense_neurons": 300, "activation": "tanh"}},  # no kink, where rounding decides
}


def error_along_a_run(
    num_states: int, setting: str, every: int = 1, optimizer: str = "adam", decay: float = 0.0
) -> float:
    """Return the largest relative error of anything that a step changes, at states along a plain run, `every` apart."""
    step, plain = (hybrid_step(**SETTINGS[setting]) for _ in range(2))
    for one in (step, plain):
        one.optimizer = OPTIMIZERS[optimizer](one.parameters, LR, decay)
    functions, worst = engines.hybrid(step), 0.0
    for number in range(num_states * every):
        if number % plain.num_steps == 0:
            plain.start_epoch(7, number)
            step.start_epoch(7, number)
        compared = number % every == every - 1
        if compared:
            for a, b in zip(step.state(), plain.state(), strict=True):
                a.copy_(b)
            torch.manual_seed(number)
            step(functions)
        torch.manual_seed(number)
        plain()
        if compared:
            worst = max(worst, *(relative_error(a, b) for a, b in zip(step.state(), plain.state(), strict=True)))
    return worst


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_from_equal_states(setting: str) -> None:
    assert error_along_a_run(1, setting, every=6) < 2e-5


@pytest.mark.parametrize("decay", [pytest.param(0.0, marks=pytest.mark.long), 0.05])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_updates_from_equal_states(optimizer: str, decay: float) -> None:
    # Orthogonalised, the small directions of a gradient are as large as the others, and so is their rounding.
    limit = 1e-4 if optimizer == "muon" else 2e-5
    assert error_along_a_run(1, "plain", every=2, optimizer=optimizer, decay=decay) < limit


@pytest.mark.long
@pytest.mark.parametrize("setting", SETTINGS)
def test_steps_from_fifty_equal_states(setting: str) -> None:
    worst = error_along_a_run(50, setting)
    print(f"\nlargest relative error of a step's state over 50 states, {setting}: {worst:.2g}")
    assert worst < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)])
def test_16_bit_gradients_are_as_near_to_fp32_as_the_plain_ones(dtype: torch.dtype) -> None:
    def gradient(kind: torch.dtype, hybrid: bool) -> Tensor:
        step = hybrid_step(dtype=kind, network={"filters": (16, 24, 16, 24, 16)})
        step(engines.hybrid(step) if hybrid else None)
        return step.parameters.gradient

    exact = gradient(torch.float32, False)
    plain, ours = (relative_error(gradient(dtype, hybrid), exact) for hybrid in (False, True))
    assert ours < 1.2 * plain


def test_a_loss_that_is_not_finite_changes_no_weight() -> None:
    step = hybrid_step()
    assert not written_update.refusal(step)
    functions = engines.hybrid(step)
    step(functions)
    step.network.output.bias.data[0] = float("nan")
    before = step.parameters.values.clone()
    step(functions)
    assert (float(step.skipped), float(step.optimizer.num_updates), int(step.step_count)) == (1, 1, 2)
    assert torch.equal(step.parameters.values.nan_to_num(9), before.nan_to_num(9))


def test_three_steps_captured_uncaptured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two a replay, across an epoch's end, and evaluation, whose network is the plain one."""
    monkeypatch.setattr(engines, "REHEARSALS", 1)
    results = []
    for functions in (None, engines.hybrid):
        step = hybrid_step(limit=2)
        own = functions(step) if functions else None
        run_epochs(step, engines.Graphed(step, own, capture=lambda steps: steps, steps_per_replay=2), 3)
        made = engines.ENGINES["hybrid" if functions else "eager"]
        scored = Evaluator(step.network, make_feed(7, DEVICE), step.normalise, made, num_classes=4)()
        results.append(([tensor.clone() for tensor in step.state()], scored))
    (plain, theirs), (hybrid, ours) = results
    for a, b in zip(hybrid, plain, strict=True):
        assert relative_error(a, b) < 1e-3  # over three steps of fp32
    assert torch.equal(ours.predicted, theirs.predicted)


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_a_batch_is_read_and_normalised_as_one_graph() -> None:
    step = hybrid_step(augmentations=("flip", "shift"))
    plain, targets = engines._read_normalised(step)
    torch._dynamo.reset()
    read = torch.compile(lambda: engines._read_normalised(step), fullgraph=True, backend="aot_eager")
    compiled, same = read()
    torch._dynamo.reset()
    torch.testing.assert_close(compiled.images, plain.images)
    assert torch.equal(targets, same)
    assert compiled.images.is_contiguous(memory_format=torch.channels_last)


def test_what_is_not_for_the_kernels_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hybrid_forward.plain_blocks(make_model()) == ""
    model = make_model(image_size=50)
    assert "block 2 takes the plain path: its side, 25, is odd" in hybrid_forward.plain_blocks(model)
    with pytest.raises(NoEngine, match=r"its type is torch\.float64"):
        engines.ENGINES["hybrid"](make_step(dtype=torch.float64))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if DEVICE.type == "cpu":
        with pytest.raises(NoEngine, match="needs an NVIDIA GPU"):
            engines.ENGINES["hybrid"](make_step())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NoEngine, match="triton is not installed"):
        engines.ENGINES["hybrid"](make_step())


@triton.jit
def last_place(found, window, width, OUT: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    channel = tl.arange(0, 16)
    _, place, _ = kernels.places(window, window + 16, channel, channel < OUT, 16, OUT)
    pixel = kernels.first_pixels(window + tl.arange(0, 16), width, channel, OUT)
    tl.store(found, tl.max(tl.max(place, 1), 0))
    tl.store(found + 1, tl.max(tl.max(pixel, 1), 0))


def test_offsets_take_64_bits() -> None:
    """2,048 images of 256 pixels and 64 channels: 2^33 values in a map of full size."""
    found, window = torch.zeros(2, dtype=torch.int64, device=DEVICE), 2048 * 128 * 128 - 16
    last_place[(1,)](found, window, 128, 64)
    assert found.tolist() == [(window + 15) * 64 + 15, (2048 * 256 * 256 - 256 - 2) * 64 + 15]


def names_with(word: str) -> Sequence[str]:
    return [name for name in engines.ENGINES if word in name]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the interpreter tells what is loaded and stored")
def test_counted_bytes_are_what_the_kernels_load_and_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses that each pass touches, each once, against `roofline.passes`: one block at 16 px, within 5%."""
    from triton.runtime.interpreter import InterpreterBuilder

    from bench.harness.roofline import passes

    touched: dict[tuple[str, str], list[np.ndarray]] = {}
    kernel = ""

    def watched(name: str) -> Any:
        plain = getattr(InterpreterBuilder, name)

        def access(self: Any, pointers: Any, *rest: Any) -> Any:
            mask = rest["store" in name].data if "masked" in name else True
            width = pointers.get_element_ty().primitive_bitwidth // 8
            places = pointers.data[np.broadcast_to(mask, pointers.data.shape).astype(bool)].ravel()
            if places.size > 64:  # maps alone: not what belongs to channels and programs
                touched.setdefault((kernel, name[:13]), []).append(np.stack([places, np.full_like(places, width)]))
            return plain(self, pointers, *rest)

        return access

    for name in ("create_masked_load", "create_masked_store"):
        monkeypatch.setattr(InterpreterBuilder, name, watched(name))
    run = launch.Launch.run

    def counted(self: launch.Launch) -> None:
        nonlocal kernel
        kernel = next(name for name in ("NORMALISE", "POOL", "SPREAD", "REDUCE") if self.arguments.get(name))
        run(self)

    monkeypatch.setattr(launch.Launch, "run", counted)
    sums = torch.randn(4, 8, 16, 16).to(memory_format=torch.channels_last).requires_grad_()
    norm = Norm(*(torch.ones(8) for _ in range(4)), 0.1, 1e-5)
    z = pool_norm(sums, torch.zeros(8, requires_grad=True), "relu", norm, new_counters(DEVICE))
    torch.autograd.grad(z, sums, torch.ones_like(z))
    expected = {one.name: one.bytes for one in passes((8,), batch=4, image_size=16, element_bytes=4)}
    for which, name in (
        ("POOL", "activation, pooling, statistics"),
        ("NORMALISE", "normalise"),
        ("REDUCE", "gradient sums of the batch norm"),
        ("SPREAD", "gradient through norm, activation, pooling"),
    ):
        moved = 0
        for (own, _), found in touched.items():
            if own == which:
                moved += int(np.unique(np.concatenate(found, 1), axis=1)[1].sum())
        assert moved == pytest.approx(expected[f"block 1: {name}"], rel=0.05), name


@pytest.mark.cuda
@pytest.mark.parametrize("name", names_with("hybrid"))
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("augmentations", [(), ("flip", "shift"), ("flip", "cutout")])
def test_hybrid_learns_on_a_gpu(name: str, dtype: torch.dtype, augmentations: tuple[str, ...]) -> None:
    model = make_model(filters=(32,) * 5)
    step = make_step(num_steps=200, device=DEVICE, dtype=dtype, model=model, augmentations=augmentations)
    engine, used = engines.build(name, step, strict=True)
    assert used == name
    run_epochs(step, engine, step.num_steps)
    first = step.sums.read().loss
    run_epochs(step, engine, 180)
    step.sums.reset()
    run_epochs(step, engine, step.num_steps)
    assert step.sums.read().loss < 0.9 * first


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore")
def test_captured_equals_uncaptured_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, with deterministic convolutions: the kernels add in a fixed order."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    results = []
    for name in names_with("hybrid"):
        step = make_step(device=DEVICE, model=make_model(filters=(32,) * 5), augmentations=("flip", "shift"))
        torch.cuda.manual_seed(3)
        engine, _ = engines.build(name, step, strict=True)
        run_epochs(step, engine, 50)
        results.append([tensor.clone() for tensor in step.state()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.cuda
def test_one_launch_is_two_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that wait for each other give what two launches in turn give, to the bit; many windows and channels."""
    torch.manual_seed(0)
    sums, gain = torch.randn(64, 160, 64, 64, device=DEVICE), torch.rand(160, device=DEVICE) + 0.5
    results = []
    for together in (True, False):
        monkeypatch.setattr(launch, "can_meet", lambda device, together=together: together)
        x = sums.to(memory_format=torch.channels_last).detach().requires_grad_()
        norm = Norm(gain, gain, torch.zeros_like(gain), torch.ones_like(gain), 0.1, 1e-5)
        counters = new_counters(DEVICE)
        for _ in range(3):
            z = pool_norm(x, gain, "relu", norm, counters)
            gradient = torch.autograd.grad(z, x, torch.ones_like(z))[0]
        results.append((z.detach(), gradient))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore")
def test_launches_that_begin_early_change_no_bit_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability(DEVICE) < (9, 0):
        pytest.skip("needs compute capability 9.0")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    results = []
    for early in (lambda one: False, lambda one: not one.meets):
        monkeypatch.setattr(launch, "starts_early", early)
        step = make_step(device=DEVICE, model=make_model(filters=(32,) * 5), augmentations=("flip", "shift"))
        torch.cuda.manual_seed(3)
        engine, _ = engines.build("hybrid+graphed", step, strict=True)
        run_epochs(step, engine, 50)
        results.append([tensor.clone() for tensor in step.state()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
