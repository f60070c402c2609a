from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from fastcnn.errors import UsageError
from fastcnn.network.small_cnn import ACTIVATIONS, MONOTONE, SmallCNN


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    model = SmallCNN(7, filters=(4, 5, 6, 7, 8), activation=activation, image_size=32)
    logits = model(torch.randn(3, 3, 32, 32))
    assert logits.shape == (3, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize("activation", sorted(MONOTONE))
def test_pooling_before_a_monotone_activation_changes_nothing(activation: str) -> None:
    torch.manual_seed(0)
    first = SmallCNN(5, filters=(4,) * 5, activation=activation, image_size=64, pool_first=True).double()
    last = SmallCNN(5, filters=(4,) * 5, activation=activation, image_size=64, pool_first=False).double()
    last.load_state_dict(first.state_dict())
    images, labels = torch.randn(6, 3, 64, 64, dtype=torch.float64), torch.randint(0, 5, (6,))
    results = []
    for model in (first, last):
        loss = F.cross_entropy(model(images), labels)
        results.append((loss, torch.autograd.grad(loss, list(model.parameters()))))
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_default_pools_first_only_where_that_is_exact() -> None:
    for activation in ACTIVATIONS:
        block = SmallCNN(2, filters=(2,) * 5, activation=activation, image_size=32).blocks[0]
        assert block.pool_first == (activation in MONOTONE)


@pytest.mark.parametrize("image_size", [32, 33, 47, 64, 100, 128])
def test_any_image_size(image_size: int) -> None:
    assert SmallCNN(2, filters=(2,) * 5, image_size=image_size)(torch.randn(2, 3, image_size, image_size)).shape == (
        2,
        2,
    )


def test_layers_are_those_of_the_assignment() -> None:
    model = SmallCNN(10)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["blocks.0.conv.weight"] == (32, 3, 3, 3)
    assert shapes["blocks.4.conv.weight"] == (32, 32, 3, 3)
    assert shapes["dense.weight"] == (128, 512)
    assert shapes["output.weight"] == (10, 128)
    assert not any("num_batches_tracked" in name for name in model.state_dict())
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.dim() == 4)


def test_options_rebuild_the_network() -> None:
    model = SmallCNN(3, filters=(2, 3, 4, 5, 6), kernel_size=5, activation="mish", batch_norm=False, image_size=40)
    twin = SmallCNN(**copy.deepcopy(model.options))
    twin.load_state_dict(model.state_dict())


def test_flip_at_evaluation_is_the_mean_of_both_mirror_images() -> None:
    model = SmallCNN(3, filters=(4,) * 5, image_size=40, tta="flip").double()
    images = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    plain = SmallCNN(**{**model.options, "tta": "none"}).double()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(images), plain(images)), "training takes the images as they are"
    model.eval()
    plain.eval()
    torch.testing.assert_close(model(images), (plain(images) + plain(images.flip(3))) / 2, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(images), model(images.flip(3)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "rellu"}, "expected one of relu, gelu.*did you mean 'relu'"),
        ({"filters": (32, 32)}, "five numbers"),
        ({"kernel_size": 2}, "odd"),
        ({"dropout": 1.0}, "0 to below 1"),
        ({"image_size": 16}, "32 or more"),
        ({"tta": "flop"}, "one of none, flip, got 'flop'"),
        ({"num_classes": 1}, "2 or more"),
        ({"dense_neurons": 0}, "1 or more"),
    ],
)
def test_wrong_values(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SmallCNN(**{"num_classes": 4, **options})
