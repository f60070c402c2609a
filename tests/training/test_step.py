"""The training step, its optimizer, its feed and its evaluation, against plain loops written out here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.data.feeds import Feed
from fastcnn.network.pixels import Normalise
from fastcnn.network.small_cnn import SmallCNN
from fastcnn.reporting.class_scores import confusion_matrix
from fastcnn.training.evaluation import BATCH_SIZE, Evaluator
from fastcnn.training.optimizers import Adam
from fastcnn.training.parameters import FlatParameters, ordered
from fastcnn.training.step import TrainingStep

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_feed(count: int, size: int = 32, num_classes: int = 4) -> Feed:
    generator = torch.Generator().manual_seed(1)
    return Feed(
        images=torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator),
        labels=torch.randint(0, num_classes, (count,), generator=generator),
        permutation=torch.arange(count),
        cursor=torch.zeros(1, dtype=torch.int64),
    )


def make_model(**options: object) -> SmallCNN:
    torch.manual_seed(0)
    return SmallCNN(4, **{"filters": (4, 5, 6, 7, 8), "image_size": 32, "dense_neurons": 16, **options})


def make_step(model: SmallCNN, feed: Feed, batch_size: int, dtype: torch.dtype = torch.float32) -> TrainingStep:
    parameters = FlatParameters(model, dtype)
    normalise, lr_schedule = Normalise(MEAN, STD, 32, dtype), torch.full((100,), 1e-2)
    return TrainingStep(
        parameters, Adam(parameters, 1e-2), feed, normalise, batch_size=batch_size, lr_schedule=lr_schedule
    )


def reference_input(images: Tensor) -> Tensor:
    x = images.permute(0, 3, 1, 2).double() / 255
    return (x - torch.tensor(MEAN, dtype=torch.float64).view(1, 3, 1, 1)) / torch.tensor(STD, dtype=torch.float64).view(
        1, 3, 1, 1
    )


def test_normalise() -> None:
    images = make_feed(5).images
    x = Normalise(MEAN, STD, 32)(images)
    assert x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x.double(), reference_input(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_twenty_steps_against_a_plain_loop(batch_norm: bool) -> None:
    """Adam over per-layer parameters, batches by slicing: the same weights. In fp32 they drift apart in a few steps."""
    feed, model, plain = make_feed(40), make_model(batch_norm=batch_norm), make_model(batch_norm=batch_norm)
    step = make_step(model.double(), feed, 8, torch.float64)
    optimizer = torch.optim.Adam(plain.double().parameters(), lr=1e-2)
    normalise = Normalise(MEAN, STD, 32, torch.float64)
    for epoch in (1, 2):
        feed.start_epoch(7, epoch)
        step.sums.reset()
        order = torch.from_numpy(np.random.default_rng([7, epoch]).permutation(40))
        total, right = 0.0, 0
        for batch in order.split(8):
            step()
            optimizer.zero_grad()
            logits = plain(normalise(feed.images[batch]))
            loss = F.cross_entropy(logits, feed.labels[batch])
            loss.backward()
            optimizer.step()
            total += loss.item() * 8
            right += int((logits.argmax(1) == feed.labels[batch]).sum())
        score = step.sums.read()
        assert score.count == 40
        assert score.loss == pytest.approx(total / 40, rel=1e-5)
        assert score.accuracy * 40 == pytest.approx(right)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_flat_update_is_adam_to_the_bit() -> None:
    """From equal gradients, one update of the flat buffer equals one of each parameter."""
    model, plain = make_model(), make_model()
    parameters = FlatParameters(model)
    flat = Adam(parameters, 1e-3)
    single = torch.optim.Adam(plain.parameters(), lr=torch.tensor(1e-3), fused=True)
    for _ in range(5):
        gradients = [torch.randn_like(p) for _, p in ordered(plain)]
        parameters.set_gradients(gradients)
        flat.step(torch.zeros(()))
        for (_, p), gradient in zip(ordered(plain), gradients, strict=True):
            p.grad = gradient
        single.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
        assert a.stride() == b.stride()


def test_parameters_are_views_of_the_buffer() -> None:
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = FlatParameters(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        parameters.values.zero_()
    assert all(not p.any() for p in model.parameters())
    model.load_state_dict(before)
    assert parameters.values.any()
    assert parameters.values.numel() == sum(p.numel() for p in model.parameters())


def test_each_epoch_has_its_own_order_and_takes_every_photo_once() -> None:
    feed = make_feed(50)
    orders = []
    for epoch in (1, 2, 1):
        feed.start_epoch(3, epoch)
        orders.append(feed.permutation.clone())
        assert feed.permutation.sort().values.equal(torch.arange(50))
    assert orders[0].equal(orders[2])
    assert not orders[0].equal(orders[1])


def test_bf16_gradients_are_near_fp32() -> None:
    feed = make_feed(16)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        step = make_step(make_model(), feed, 16, dtype)
        feed.cursor.zero_()
        step()
        assert step.parameters.values.dtype == torch.float32
        gradients.append(step.parameters.gradient.clone())
    assert F.cosine_similarity(*gradients, dim=0) > 0.98


@pytest.mark.parametrize("count", [1, 5, BATCH_SIZE - 1, BATCH_SIZE, BATCH_SIZE + 1, 2 * BATCH_SIZE + 3])
def test_evaluation_counts_every_photo_once(count: int) -> None:
    feed, model = make_feed(count), make_model().eval()
    result = Evaluator(model, feed, Normalise(MEAN, STD, 32))()
    with torch.no_grad():
        logits = model(reference_input(feed.images).float())
    assert result.score.count == count
    assert result.score.loss == pytest.approx(F.cross_entropy(logits, feed.labels).item(), rel=1e-4)
    assert result.predicted.equal(logits.argmax(1))
    assert result.score.accuracy == pytest.approx((logits.argmax(1) == feed.labels).float().mean().item())


def test_evaluation_changes_nothing() -> None:
    model = make_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Evaluator(model, make_feed(9), Normalise(MEAN, STD, 32))()
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_confusion_matrix() -> None:
    matrix = confusion_matrix(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0]), 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("filters", "kernel_size"), [((1, 2, 1, 3, 1), 1), ((1, 1, 4, 1, 2), 3), ((3, 3, 3, 3, 3), 5)])
def test_gradients_reach_their_parameters(filters: tuple[int, ...], kernel_size: int, dtype: torch.dtype) -> None:
    """Whatever strides a parameter or its gradient has: a plain step through the buffer moves each rightly."""
    options = {"filters": filters, "kernel_size": kernel_size, "image_size": 32, "dense_neurons": 16}
    torch.manual_seed(0)
    model = SmallCNN(4, **options)  # type: ignore[arg-type]
    torch.manual_seed(0)
    plain = SmallCNN(4, **options)  # type: ignore[arg-type]
    parameters = FlatParameters(model, dtype)
    gradients = [torch.randn(p.shape).to(p.dtype) for p in parameters.inputs]
    parameters.set_gradients(gradients)
    parameters.values.sub_(parameters.gradient)
    parameters.refresh()
    for (name, p), gradient in zip(ordered(plain), gradients, strict=True):
        expected = p.detach() - gradient.float()
        assert torch.equal(model.get_parameter(name), expected), name
        low = parameters.compute.get_parameter(name)
        assert torch.equal(low, expected.to(low.dtype)), name
    assert all(a is b for a, b in zip(model.buffers(), parameters.compute.buffers(), strict=True))
