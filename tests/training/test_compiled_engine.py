"""The compiled engine's parts against the plain step, and what is said where they do not compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.errors import FastCNNWarning
from fastcnn.training import engines
from fastcnn.training.augment import AUGMENTATIONS, Augment, Batch
from fastcnn.training.engines import Graphed, NoEngine
from fastcnn.training.optimizers import OPTIMIZERS
from fastcnn.training.schedules import average_weights
from fastcnn.training.step import StepFunctions, TrainingStep
from tests.training.steps import (
    DECAY,
    LR,
    direct_call,
    make_model,
    make_step,
    relative_error,
    run_epochs,
)


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


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["plain loops", "vectors"])
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
