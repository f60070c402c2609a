"""Fused blocks against float64 autograd: on a GPU where there is one, else by Triton's interpreter."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.network import fused_forward
from fastcnn.network.pixels import Normalise, UnreadBatch
from fastcnn.network.small_cnn import ACTIVATIONS, MONOTONE
from fastcnn.training import engines
from fastcnn.training.engines import NoEngine
from fastcnn.training.evaluation import Evaluator
from fastcnn.training.step import StepFunctions, TrainingStep
from tests.training.test_engines import fallback_random, make_augment, make_feed, make_model, make_step, run_epochs

pytest.importorskip("triton")

from fastcnn.network.kernels import activations, autotune, block_operators
from fastcnn.network.kernels.autotune import Maps, Tile

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPS = 1e-5
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@pytest.fixture(scope="module", autouse=True)
def _no_overflow_checks() -> None:
    """A third of the interpreter's time goes into asking whether whole numbers overflow."""
    from triton.runtime.interpreter import interpreter_builder

    interpreter_builder.options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)


def test_every_activation_is_there() -> None:
    assert set(activations.ACTIVATIONS) == set(ACTIVATIONS)
    assert {name for name, one in activations.ACTIVATIONS.items() if one.monotone} == MONOTONE


def rounded(x: Tensor, kind: torch.dtype) -> Tensor:
    """Values rounded as a kernel rounds what it multiplies; the gradient passes."""
    return x if kind == torch.float32 else x + (x.detach().float().to(kind).to(x.dtype) - x.detach())


def after(sums: Tensor, activation: str, kind: torch.dtype) -> Tensor:
    """(N, C, H, W) -> pooled (N, H / 2, W / 2, C), as stored."""
    pooled = F.max_pool2d(ACTIVATIONS[activation]()(sums), 2)
    if activation in MONOTONE:  # ties of what is rounded to the same value by the activation are none before it
        pooled = ACTIVATIONS[activation]()(F.max_pool2d(sums, 2))
    return rounded(pooled.permute(0, 2, 3, 1), kind)


def moments_of(pooled: Tensor) -> Tensor:
    variance = pooled.var((0, 1, 2), unbiased=False)
    return torch.stack([pooled.mean((0, 1, 2)), (variance + EPS).rsqrt()])


def block_by_torch(inputs: Sequence[Tensor | None], activation: str, kind: torch.dtype) -> Tensor:
    x, moments, gamma, beta, weight, bias = inputs
    assert x is not None
    assert weight is not None
    z = x
    if moments is not None and gamma is not None and beta is not None:
        z = (x - moments[0]) * (moments[1] * gamma) + beta
        low = [t.detach().float() for t in (x, moments, gamma, beta)]  # rounded from fp32 sums, as the kernel has them
        fp32 = (low[0] - low[1][0]) * (low[1][1] * low[2]) + low[3]
        z = z if kind == torch.float32 else z + (fp32.to(kind).to(z.dtype) - z.detach())
    return after(F.conv2d(z.permute(0, 3, 1, 2), weight, bias, padding=1), activation, kind)


def first_by_torch(
    images: Tensor, weight: Tensor, bias: Tensor, colours: Tensor, activation: str, kind: torch.dtype
) -> Tensor:
    """Whole numbers and a one; the normalisation in the weights, rounded there."""
    middle, scale, rest = colours.to(weight.dtype)
    numbers = torch.cat([images - middle, torch.ones_like(images[..., :1], dtype=weight.dtype)], 3)
    own = rounded(weight * scale[:, None, None], kind)
    one = rounded((weight * rest[:, None, None]).sum(1, keepdim=True), kind)
    sums = F.conv2d(numbers.permute(0, 3, 1, 2), torch.cat([own, one], 1), bias, padding=1)
    return after(sums, activation, kind)


def error(ours: Tensor, theirs: Tensor) -> float:
    apart, size = (ours.double() - theirs.double()).norm(), theirs.double().norm()
    return float(apart / size if size > 0 else apart)


class Case:
    """A block of random shape, input and arithmetic."""

    def __init__(self, seed: int) -> None:
        pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.kind = [torch.float32, torch.bfloat16, torch.float32, torch.float16][seed % 4]
        self.activation = list(ACTIVATIONS)[pick.randrange(len(ACTIVATIONS))]
        self.first, self.statistics = pick.random() < 0.3, pick.random() < 0.7
        self.pattern = pick.choice(["random", "random", "constant", "ties"])
        self.tile = Tile(pick.choice([4, 8]), pick.choice([4, 8]), pick.choice([16, 32]), 16)
        count, height = pick.randint(1, 3), 2 * pick.randint(2, 5)
        width = height if self.first else 2 * pick.randint(2, 5)
        into, out = 3 if self.first else pick.choice([16, 32, 48]), pick.choice([16, 32, 48])

        def draw(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator)
            return (values * 2).round() / 2 if self.pattern == "ties" else values  # sums are exact, too

        exact = 1 / 8 if self.first else 1 / 16
        weight = draw(out, into, 3, 3) * (exact if self.pattern == "ties" else (9 * into) ** -0.5)
        self.weight = weight.to(self.kind).to(memory_format=torch.channels_last)
        self.bias = (draw(out) * 0.5).to(self.kind)
        self.gradients = [draw(count, height // 2, width // 2, out).to(self.kind), draw(2, out)]
        if self.first:
            self.images = torch.randint(0, 256, (5, height, height, 3), dtype=torch.uint8, generator=generator)
            if self.pattern == "constant":
                self.images[:] = self.images[:1, :1, :1]
            self.photos = torch.randint(0, 5, (count,), generator=generator)
            mirror = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
            shift = torch.randint(-2, 3, (2, count), generator=generator)
            start = torch.where(mirror < 0, height - 1, 0)
            self.moves = torch.stack([mirror, start + shift[0], shift[1]], 1).int() if pick.random() < 0.7 else None
            self.colours = Normalise(MEAN, STD, height).colours
            if self.pattern == "ties":
                self.colours = torch.tensor([[128.0] * 3, [1 / 128] * 3, [0.0] * 3])
                self.images = self.images // 64 * 64
            return
        self.x = draw(count, height, width, into).to(self.kind)
        if self.pattern == "constant":
            self.x[:] = self.x[:1, :1, :1]
        self.norm: tuple[Tensor, ...] | tuple[None, None, None] = (None, None, None)
        if pick.random() < 0.7 and self.pattern != "ties":
            gamma = draw(into) * pick.choice([1.0, 1.0, 1e-3, 20.0])
            gamma[:3] = torch.tensor([0.0, -1.0, 5.0])
            self.norm = torch.stack([draw(into), 0.5 + draw(into).abs()]), gamma, draw(into)

    def run(self) -> dict[str, float]:
        """Return the relative error of every result."""
        tensors = [self.weight, self.bias] if self.first else [self.x, *self.norm, self.weight, self.bias]
        leaves = [None if t is None else t.to(DEVICE).requires_grad_() for t in tensors]
        own = self.activation, self.statistics, EPS
        if self.first:
            moves = None if self.moves is None else self.moves.to(DEVICE)
            made = block_operators.first_block(
                self.images.to(DEVICE), self.photos.to(DEVICE), moves, self.colours.to(DEVICE), *leaves, *own
            )
        else:
            made = block_operators.block(*leaves, *own)
        if self.statistics:  # where values are equal but for fp32's last bit, the gradient of their deviation is noise
            pooled = self.plain(tensors, torch.float64)[0][0].detach().flatten(0, 2)
            self.gradients[1][1] *= pooled.var(0) > 1e-10 * (1 + pooled.mean(0).square())
        theirs, theirs_back = self.plain(tensors, torch.float64)
        ours = [made[0], made[3]][: len(theirs)]
        gradients = [g.to(DEVICE) for g in self.gradients[: len(theirs)]]
        ours_back = torch.autograd.grad(ours, [t for t in leaves if t is not None], gradients)
        names = [n for n, t in zip(self.names(), leaves, strict=True) if t is not None] + ["pooled", "moments"]

        def errors(results: Sequence[Tensor]) -> dict[str, float]:
            pairs = zip(names, results, [*theirs_back, *theirs], strict=False)
            return {name: error(a.detach().cpu(), b.detach()) for name, a, b in pairs}

        found = errors([*ours_back, *ours])
        if self.statistics:
            found["variance"] = error(made[4].cpu(), theirs[0].detach().var((0, 1, 2)))
        if self.pattern == "constant":
            found.pop("x", None)  # all pixels of a window tie, and which of them wins is a matter of the last bit
            if self.kind != torch.float32 and self.statistics:
                found.pop("bias")  # what the norm's gradient takes from each value it gives to others: little is left
        if self.kind == torch.float32:  # some gradients hang on the last bit of what fp32 holds, whoever computes them
            results, back = self.plain(tensors, torch.float32)
            plain = errors([*back, *results])
            found = {
                name: e if e < BOUNDS[self.kind] or e > 3 * plain.get(name, 0) else 0.0 for name, e in found.items()
            }
        return found

    def plain(self, tensors: Sequence[Tensor | None], kind: torch.dtype) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Return results and gradients by torch, in another arithmetic."""
        exact = [None if t is None else t.detach().to(kind).requires_grad_() for t in tensors]
        if self.first:
            images = UnreadBatch(self.images, self.photos, self.moves).read()
            pooled = first_by_torch(images, *exact, self.colours, self.activation, self.kind)  # type: ignore[arg-type]
        else:
            pooled = block_by_torch(exact, self.activation, self.kind)
        results = [pooled, moments_of(pooled)] if self.statistics else [pooled]
        gradients = [g.to(kind) for g in self.gradients[: len(results)]]
        return results, torch.autograd.grad(results, [t for t in exact if t is not None], gradients)

    def names(self) -> list[str]:
        """Return what the inputs are called."""
        return ["weight", "bias"] if self.first else ["x", "moments_in", "gamma", "beta", "weight", "bias"]

    def __str__(self) -> str:
        shown = {k: v for k, v in vars(self).items() if isinstance(v, bool | str | Tile | torch.dtype)}
        return f"{shown} {tuple(self.weight.shape)}"


def check(seed: int, monkeypatch: pytest.MonkeyPatch) -> float:
    case = Case(seed)
    monkeypatch.setattr(autotune, "candidates", lambda kind, maps, dtype: [case.tile])
    found = case.run()
    worst = max(found.values())
    assert worst < BOUNDS[case.kind], f"{case}: {found}"
    return worst


@pytest.mark.parametrize("seed", range(30))
def test_thirty_blocks_against_float64(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(seed, monkeypatch)


@pytest.mark.long
def test_three_hundred_blocks_against_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    worst: dict[torch.dtype, float] = {}
    for seed in range(100, 400):
        found = check(seed, monkeypatch)
        kind = Case(seed).kind
        worst[kind] = max(found, worst.get(kind, 0.0))
    print(f"\nlargest relative errors of 300 blocks: { {str(k): f'{v:.1e}' for k, v in worst.items()} }")


def fused_functions(step: TrainingStep) -> StepFunctions:
    """Return a step's functions with fused blocks, whether or not this device has kernels for them."""
    forward = fused_forward.FusedForward(step.functions.forward)
    return dataclasses.replace(step.functions, forward=forward, reads_unread_batches=True)


def two_steps(**options: Any) -> tuple[TrainingStep, TrainingStep]:
    """Two steps from the same weights."""
    steps = []
    for _ in range(2):
        augmentations = options.get("augmentations", ())
        network = {"filters": (16,) * 5, **{k: v for k, v in options.items() if k != "augmentations"}}
        steps.append(make_step(model=make_model(**network), augmentations=augmentations, device=DEVICE))
    return steps[0], steps[1]


def gradients_along_a_run(num_states: int, every: int = 1, **options: Any) -> float:
    """Return the largest relative error of the fused gradient, at states along a plain run."""
    step, plain = two_steps(**options)
    functions, worst = fused_functions(step), 0.0
    for number in range(num_states * every):
        if number % plain.num_steps == 0:
            plain.start_epoch(7, number)
            step.start_epoch(7, number)
        if number % every == 0:
            for a, b in zip(step.state(), plain.state(), strict=True):
                a.copy_(b)
            torch.manual_seed(number)
            step(functions)
        torch.manual_seed(number)
        plain()
        if number % every == 0:
            worst = max(worst, error(step.parameters.gradient, plain.parameters.gradient))
            for ours, theirs in zip(step.network.buffers(), plain.network.buffers(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    return worst


def test_gradients_from_equal_states() -> None:
    """Block 4 is none for the kernels: it takes the plain path, with the norm before it applied and its own after."""
    assert gradients_along_a_run(2, every=10, filters=(16, 16, 16, 8, 16), augmentations=("flip", "shift")) < 1e-4


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, {"activation": "gelu", "batch_norm": False, "augmentations": ("flip",)}])
def test_gradients_at_fifty_states(options: dict[str, Any]) -> None:
    worst = gradients_along_a_run(50, **options)
    print(f"\nlargest relative error of the fused gradient over 50 states, {options}: {worst:.2g}")
    assert worst < 1e-4


def test_fused_steps_repeat_to_the_bit() -> None:
    """Sums are taken in a fixed order: two runs of a step from the same state are equal."""
    step, _ = two_steps(filters=(16,) * 5)
    functions = fused_functions(step)
    with engines.rehearsal(step):
        step(functions)
        first = [tensor.clone() for tensor in step.state()]
    step(functions)
    assert all(torch.equal(a, b) for a, b in zip(first, step.state(), strict=True))


def compiled_around(num_states: int, **options: Any) -> float:
    """Return the largest relative error of anything that a step changes, the blocks fused and all else compiled."""
    step, plain = two_steps(**options)
    worst = 0.0
    for one in (step, plain):
        one.start_epoch(7, 1)
    torch._dynamo.reset()
    with fallback_random():
        engine, name = engines.build("fused+compiled", step, strict=True)
        assert name == "fused+compiled"
        for number in range(num_states):
            for a, b in zip(step.state(), plain.state(), strict=True):
                a.copy_(b)
            for run in (engine.run, engines.Eager(plain).run):
                torch.manual_seed(number)
                run(1)
            worst = max(worst, *(error(a, b) for a, b in zip(step.state(), plain.state(), strict=True)))
    torch._dynamo.reset()
    return worst


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # inductor's own
def test_compiled_around_the_blocks_from_equal_states(compiler: None) -> None:
    assert compiled_around(1, augmentations=("flip", "shift")) < 3e-5


@pytest.mark.filterwarnings("ignore")
def test_a_compiler_takes_what_is_around_the_blocks() -> None:
    """By dynamo and autograd alone, in torch's own kernels: inductor's are in the long form."""
    step, plain = two_steps(augmentations=("flip", "shift"))
    torch._dynamo.reset()
    functions = engines.with_compiled(fused_functions(step), backend="aot_eager")
    for one, own in ((step, functions), (plain, plain.functions)):
        one.start_epoch(7, 1)
        torch.manual_seed(0)
        one(own)
    torch._dynamo.reset()
    assert max(error(a, b) for a, b in zip(step.state(), plain.state(), strict=True)) < 3e-5


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("augmentations", [(), ("flip", "shift")])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_compiled_around_the_blocks_at_five_states(
    compiler: None, batch_norm: bool, augmentations: tuple[str, ...]
) -> None:
    worst = compiled_around(5, batch_norm=batch_norm, augmentations=augmentations)
    print(f"\nlargest relative error of a step's state, batch norm {batch_norm}, {augmentations}: {worst:.2g}")
    assert worst < 3e-5


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_compiled_around_the_blocks_captured_uncaptured(compiler: None) -> None:
    """Three steps and evaluation, with blocks that take the plain path."""
    results = []
    for name in ("eager", "fused+compiled"):
        step = make_step(model=make_model(filters=(8, 16, 16, 16, 8)), device=DEVICE, augmentations=("flip",))
        with fallback_random():
            functions = step.functions if name == "eager" else engines.fused_and_compiled(step)
            torch.manual_seed(3)
            run_epochs(step, engines.Graphed(step, functions, capture=lambda steps: steps, steps_per_replay=2), 3)
            made = engines.ENGINES[name]
            scored = Evaluator(step.network, make_feed(7, DEVICE), step.normalise, made, num_classes=4)()
        results.append(([tensor.clone() for tensor in step.state()], scored))
        torch._dynamo.reset()
    (plain, theirs), (compiled, ours) = results
    for a, b in zip(compiled, plain, strict=True):
        assert error(a, b) < 1e-3  # over three steps of fp32
    assert torch.equal(ours.predicted, theirs.predicted)
    assert ours.score.loss == pytest.approx(theirs.score.loss, rel=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("augmentations", [(), ("flip", "shift")])
def test_compiling_halves_the_launches_around_the_blocks(augmentations: tuple[str, ...]) -> None:
    """Counted in the code that inductor makes for a GPU, which needs none."""
    text, code = printed("bench.kernels", "--launches", "--types", "bf16", "fp32", "--augment", *augmentations)
    print("\n" + text)
    assert code == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    found = {(engine, precision): (int(blocks), int(total)) for engine, precision, blocks, *_, total in rows}
    for precision in ("bf16", "fp32"):
        (blocks, before), (same, after) = found["fused", precision], found["fused+compiled", precision]
        assert blocks == same == 24
        assert after - blocks < (before - blocks) / 2


def test_evaluation_by_fused_blocks_is_the_plain_one() -> None:
    """With running statistics, one filled-up batch and weights that come and go by state_dict: the network is one."""
    trained = make_model(filters=(16,) * 5)
    for name, buffer in trained.named_buffers():
        buffer.copy_(0.5 + torch.rand_like(buffer) if "var" in name else torch.randn_like(buffer))
    model = make_model(filters=(16,) * 5).to(DEVICE)
    model.load_state_dict(trained.state_dict())
    feed, normalise = make_feed(7, DEVICE), Normalise(MEAN, STD, 32, torch.float32, DEVICE)
    plain = Evaluator(model, feed, normalise, num_classes=4)()
    ours = Evaluator(model, feed, normalise, engines.ENGINES["fused"], num_classes=4)()
    assert ours.score.count == 7
    assert ours.score.loss == pytest.approx(plain.score.loss, rel=1e-5)
    assert torch.equal(ours.predicted, plain.predicted)
    torch.testing.assert_close(ours.probabilities, plain.probabilities, rtol=1e-4, atol=1e-6)
    assert list(model.state_dict()) == list(trained.state_dict())


def small_block() -> tuple[Any, ...]:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 4, 4, 16), torch.randn(16, 16, 3, 3).to(memory_format=torch.channels_last)
    moments = torch.stack([torch.randn(16), torch.rand(16) + 0.5])
    tensors = [x, moments, torch.randn(16), torch.randn(16), weight, torch.randn(16)]
    return (*(t.to(DEVICE).requires_grad_() for t in tensors), "gelu", True, EPS)


def test_operators_are_what_torch_expects() -> None:
    """Schema, fake implementation, autograd registration and tracing, by torch's own checks."""
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(block_operators.block, small_block(), test_utils=tests)
    images = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8, device=DEVICE)
    weight = torch.randn(16, 3, 3, 3, device=DEVICE).to(memory_format=torch.channels_last).requires_grad_()
    bias, colours = torch.randn(16, device=DEVICE, requires_grad=True), Normalise(MEAN, STD, 4).colours.to(DEVICE)
    torch.library.opcheck(
        block_operators.first_block, (images, None, None, colours, weight, bias, "relu", True, EPS), test_utils=tests
    )


def test_blocks_compile_in_one_graph() -> None:
    """Forward and backward under torch.compile give what they give without."""

    def results(block: Any) -> list[Tensor]:
        *tensors, activation, statistics, eps = small_block()
        pooled, _, _, moments, _ = block(*tensors, activation, statistics, eps)
        return [pooled, *torch.autograd.grad(pooled.sum() + moments.square().sum(), tensors)]

    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: block_operators.block(*args), fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(results(compiled), results(block_operators.block), strict=True):
        assert torch.equal(ours, theirs)
    torch._dynamo.reset()


@pytest.mark.parametrize("names", [(), ("flip",), ("flip", "shift")])
def test_an_unread_batch_is_what_is_read(names: tuple[str, ...]) -> None:
    feed, photos = make_feed(9), torch.tensor([3, 3, 8, 0])
    batch = feed.images, photos, feed.labels[photos]
    augment, more = make_augment(names), make_augment((*names, "cutout"))
    read = augment(*batch, augment.draw(4, (2, 1)))
    unread = augment(*batch, augment.draw(4, (2, 1)), unread=True)
    assert isinstance(unread.images, UnreadBatch)
    assert torch.equal(unread.images.read(), read.images)  # type: ignore[arg-type]
    changed = more(*batch, more.draw(4, (2, 1)), unread=True)
    assert isinstance(changed.images, Tensor)


def test_what_is_not_fused_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(filters=(16, 16, 8, 16, 16))
    assert fused_forward.refusals(model)[:2] == ["", ""]
    assert fused_forward.plain_blocks(model) == (
        "block 3 takes the plain path: its channels, 16 to 8, are not multiples of 16; "
        "block 4 takes the plain path: its channels, 8 to 16, are not multiples of 16"
    )
    assert "its side, 25, is odd" in fused_forward.plain_blocks(make_model(filters=(16,) * 5, image_size=50))
    with pytest.raises(NoEngine, match="its kernel is 5x5, not 3x3"):
        engines.ENGINES["fused"](make_step(model=make_model(filters=(16,) * 5, kernel_size=5)))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if DEVICE.type == "cpu":
        with pytest.raises(NoEngine, match="needs an NVIDIA GPU"):
            engines.ENGINES["fused"](make_step(model=make_model(filters=(16,) * 5)))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NoEngine, match="triton is not installed"):
        engines.ENGINES["fused"](make_step(model=make_model(filters=(16,) * 5)))


def test_tiles_are_kept_and_damage_is_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "_known", {"a": {"rows": 4}})
    path = tmp_path / "cache" / "tiles.json"
    assert autotune._read(path) == {}
    autotune._write(path)
    assert autotune._read(path) == {"a": {"rows": 4}}
    path.write_text("[")
    assert autotune._read(path) == {}


def test_tiles_cover_maps_once() -> None:
    maps, tile = Maps(3, 6, 10, 16, 16), Tile(4, 8, 16, 16)
    assert tile.num_tiles(maps) == 5 * 2
    for most in (1, 3, 4, 100):
        covering = tile.covering(maps, most)
        programs = tile.num_programs(maps, most)
        assert programs <= most
        assert (programs - 1) * covering["per_program"] < 10 <= programs * covering["per_program"]


def printed(module: str, *arguments: str) -> tuple[str, int]:
    """What a module prints and its exit code, in a process of its own: without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.stdout, done.stderr
    return done.stdout, done.returncode


def test_machine_code_without_a_gpu() -> None:
    """For one network and one GPU, the tiles that are used unmeasured: tensor cores, nothing spilled."""
    text, code = printed(
        "bench.kernels", "--types", "bf16", "--architectures", "90", "--activations", "relu", "--quick"
    )
    assert code == 0, text
    assert "| block_forward | 90 | bf16 |" in text
    assert "11 kernels, 0 that spill or multiply 16-bit values without tensor cores" in text


@pytest.mark.long
def test_machine_code_of_all_shipped_tiles() -> None:
    text, code = printed("bench.kernels")
    print("\n" + text)
    assert code == 0, text


@pytest.mark.cuda
@pytest.mark.parametrize("name", [name for name in engines.ENGINES if name.startswith("fused")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("augmentations", [(), ("flip", "shift"), ("flip", "cutout")])
def test_fused_learns_on_a_gpu(name: str, dtype: torch.dtype, augmentations: tuple[str, ...]) -> None:
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
@pytest.mark.parametrize("uncaptured", ["fused", "fused+compiled"])
def test_captured_equals_uncaptured_on_a_gpu(uncaptured: str) -> None:
    """To the bit: the kernels add in a fixed order, and the dense layers' kernels are the same."""
    results = []
    for name in (uncaptured, f"{uncaptured}+graphed"):
        step = make_step(device=DEVICE, model=make_model(filters=(32,) * 5), augmentations=("flip", "shift"))
        torch.cuda.manual_seed(3)
        engine, _ = engines.build(name, step, strict=True)
        run_epochs(step, engine, 50)
        results.append([tensor.clone() for tensor in step.state()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_fused_gradients_are_near_the_plain_ones_on_a_gpu(dtype: torch.dtype, batch_norm: bool) -> None:
    gradients = []
    for engine in ("eager", "fused"):
        model = make_model(filters=(32, 64, 32, 16, 32), batch_norm=batch_norm)
        step = make_step(device=DEVICE, dtype=dtype, model=model)
        engines.build(engine, step, strict=True)[0].run(1)
        gradients.append(step.parameters.gradient.clone())
    assert F.cosine_similarity(*gradients, dim=0) > (0.9999 if dtype == torch.float32 else 0.97)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the interpreter tells what is loaded and stored")
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_counted_bytes_are_what_the_kernels_load_and_store(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses that a kernel touches, each once, against `fused_passes`: two blocks at 16 px, within 5% a pass."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    sys.path.insert(0, str(ROOT))
    from bench.harness.roofline import fused_passes

    touched: list[dict[str, Any]] = []

    def watched(name: str) -> Any:
        plain = getattr(InterpreterBuilder, name)

        def access(self: Any, pointers: Any, *rest: Any) -> Any:
            stores = "store" in name
            mask = rest[1 if stores else 0].data if "masked" in name else None
            places = (
                pointers.data
                if mask is None
                else pointers.data[np.broadcast_to(mask.astype(bool), pointers.data.shape)]
            )
            width = pointers.get_element_ty().primitive_bitwidth // 8
            touched[-1].setdefault(("stored" if stores else "loaded", width), []).append(places.ravel())
            return plain(self, pointers, *rest)

        return access

    for name in ("create_masked_load", "create_masked_store"):
        monkeypatch.setattr(InterpreterBuilder, name, watched(name))
    run = autotune.Launch.run

    def counted(self: autotune.Launch) -> None:
        touched.append({"name": self.kernel.fn.__name__})
        run(self)

    monkeypatch.setattr(autotune.Launch, "run", counted)
    side, batch, widths = 16, 4, (16, 32)
    torch.manual_seed(0)
    x, moments = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8), None
    colours, leaves, norm = Normalise(MEAN, STD, side).colours, [], (None, None)
    for into, out in zip((3, *widths), widths, strict=False):
        weight = torch.randn(out, into, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
        leaves += [weight, torch.zeros(out, requires_grad=True)]
        own = *leaves[-2:], activation, True, EPS
        if into == 3:
            x, _, _, moments, _ = block_operators.first_block(x, None, None, colours, *own)
        else:
            x, _, _, moments, _ = block_operators.block(x, moments, *norm, *own)
        norm = torch.ones(out, requires_grad=True), torch.zeros(out, requires_grad=True)
    torch.autograd.grad(x.sum() + moments.sum(), leaves)
    measured: dict[str, list[int]] = {}
    for one in touched:
        size = sum(len(np.unique(np.concatenate(v))) * k[1] for k, v in one.items() if k != "name")
        measured.setdefault(one["name"], []).append(size)
    passes = {
        one.name: one.bytes
        for one in fused_passes(
            widths, batch=batch, image_size=side, element_bytes=4, activation=activation, programs=3
        )
    }
    for kernels, name in (
        (["first_forward"], "block 1 fused: forward"),
        (["first_weight_gradient"], "block 1 fused: weight gradient"),
        (["finish_first"], "block 1 fused: sums over programs"),
        (["block_forward"], "block 2 fused: forward"),
        (["weight_gradient"], "block 2 fused: weight gradient"),
        (["input_gradient"], "block 2 fused: input gradient"),
        (["finish_block"], "block 2 fused: sums over programs"),
    ):
        moved = sum(sum(measured[kernel]) for kernel in kernels)
        assert moved == pytest.approx(passes[name], rel=0.05), name
