"""A step on pretended CUDA tensors: shapes, types and devices of all that it does, by torch's CUDA build alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastcnn.config import STRENGTHS
from fastcnn.data.feeds import Feed
from fastcnn.network import small_cnn
from fastcnn.network.pixels import Normalise
from fastcnn.network.small_cnn import SmallCNN
from fastcnn.training import engines
from fastcnn.training.augment import AUGMENTATIONS, Augment
from fastcnn.training.evaluation import EvaluationStep
from fastcnn.training.optimizers import OPTIMIZERS
from fastcnn.training.parameters import FlatParameters
from fastcnn.training.step import TrainingStep

pytestmark = pytest.mark.skipif(
    torch.version.cuda is None or torch.cuda.is_available(), reason="needs torch's CUDA build and no GPU"
)
GPU = torch.device("cuda", 0)
KINDS = [torch.float32, torch.bfloat16, torch.float16]
EVERYTHING = {"clip_norm": 1.0, "label_smoothing": 0.1, "skip_nan": True}


@pytest.fixture(autouse=True)
def _no_gpu_is_asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Autograd's engine and the fused optimizers ask for a device that is there: gradients are zeros instead.

    Nor can weights of the kind be moved or emptied, as a layer that is made without weights is.
    """
    from fastcnn.network.kernels import launch

    def gradients(losses: Tensor, inputs: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
        assert (weights.device, weights.dtype) == (losses.device, losses.dtype)
        return [torch.zeros_like(one) for one in inputs]

    monkeypatch.setattr(torch.autograd, "grad", gradients)
    monkeypatch.setattr(nn.Module, "to", lambda self, *args, **options: self)
    monkeypatch.setattr(small_cnn, "_undrawn", lambda kind, *sizes, **options: kind(*sizes, **options))
    monkeypatch.setattr(engines, "unavailable", lambda device: "")
    monkeypatch.setattr(engines, "on_gpu", lambda step: False)  # nothing is compiled
    for optimizer in OPTIMIZERS.values():
        monkeypatch.setattr(optimizer, "_update", lambda self, skip: None)
    with launch.recording():
        yield


def step_on(kind: torch.dtype, names: Sequence[str], optimizer: str, dropout: float, **options: Any) -> TrainingStep:
    side, count = 64, 64
    feed = Feed(
        images=torch.zeros((count, side, side, 3), dtype=torch.uint8, device=GPU),
        labels=torch.zeros(count, dtype=torch.int64, device=GPU),
        permutation=torch.zeros(count, dtype=torch.int64, device=GPU),
        cursor=torch.zeros(1, dtype=torch.int64, device=GPU),
    )
    with GPU:
        model = SmallCNN(4, filters=(32,) * 5, image_size=side, dropout=dropout)
    parameters = FlatParameters(model, kind)
    return TrainingStep(
        parameters,
        OPTIMIZERS[optimizer](parameters, 1e-3, 0.1),
        feed,
        Normalise((0.5,) * 3, (0.2,) * 3, side, kind, GPU),
        batch_size=8,
        lr_schedule=torch.zeros(50),
        augment=Augment([(name, STRENGTHS[name][0]) for name in names], side),  # type: ignore[index]
        **options,
    )


@pytest.mark.parametrize("engine", ["eager", "hybrid"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_and_evaluation(kind: torch.dtype, engine: str) -> None:
    """Every augmentation, optimizer and option of a step, and evaluation afterwards."""
    augmented: list[tuple[str, ...]] = [(), ("flip", "shift"), AUGMENTATIONS]
    for names, optimizer, everything in itertools.product(augmented, OPTIMIZERS, (False, True)):
        with FakeTensorMode():
            more: dict[str, Any] = {}
            if everything:
                more = {**EVERYTHING, "class_weights": torch.ones(4), "average": torch.ones(50)}
            step = step_on(kind, names, optimizer, 0.3 if everything else 0.0, **more)
            functions = engines.hybrid(step) if engine == "hybrid" else step.functions
            for _ in range(2):
                step(functions)
            assert {tensor.device for tensor in step.state()} == {GPU}
            step.network.eval()
            evaluation = EvaluationStep(step.network, step.feed, step.normalise, 16, 4)
            evaluation()
            assert evaluation.predicted.device == GPU
