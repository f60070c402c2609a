"""Small training steps on random images, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.config import STRENGTHS
from fastcnn.data.feeds import Feed
from fastcnn.network.pixels import Normalise
from fastcnn.network.small_cnn import SmallCNN
from fastcnn.training.augment import Augment, Batch
from fastcnn.training.engines import Engine
from fastcnn.training.optimizers import Adam
from fastcnn.training.parameters import FlatParameters
from fastcnn.training.schedules import schedule
from fastcnn.training.step import TrainingStep

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


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    apart, size = (ours.double() - theirs.double()).norm(), theirs.double().norm()
    return float(apart / size if size > 0 else apart)
