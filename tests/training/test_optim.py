"""Optimizers and schedules against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastcnn.network.small_cnn import SmallCNN
from fastcnn.training.optimizers import OPTIMIZERS
from fastcnn.training.parameters import FlatParameters
from fastcnn.training.schedules import SCHEDULES, schedule

LR, DECAY = 1e-2, 0.1
PEERS: dict[str, Any] = {
    "adam": lambda groups: torch.optim.Adam(groups, LR),
    "adamw": lambda groups: torch.optim.AdamW(groups, LR),
    "sgd": lambda groups: torch.optim.SGD(groups, LR, momentum=0.9, nesterov=True),
}


def test_every_optimizer_has_a_peer() -> None:
    assert set(PEERS) == set(OPTIMIZERS)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("decay", [0.0, DECAY])
def test_ten_updates_equal_torchs(name: str, decay: float) -> None:
    """Weight decay is for weights of convolutions and dense layers only."""
    torch.manual_seed(0)
    model, plain = (SmallCNN(3, filters=(4,) * 5, image_size=32, dense_neurons=8) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    parameters = FlatParameters(model)
    optimizer = OPTIMIZERS[name](parameters, LR, decay)
    groups = [
        {"params": [p for p in plain.parameters() if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in plain.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    peer = PEERS[name](groups)
    for _ in range(10):
        gradients = [torch.randn_like(p) for p in parameters.inputs]
        parameters.set_gradients(gradients)
        optimizer.step(torch.zeros(()))
        by_name = {key: g for (key, _), g in zip(_named(model), gradients, strict=True)}
        for key, p in plain.named_parameters():
            p.grad = by_name[key].clone()
        peer.step()
    for (key, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=key)
    assert float(optimizer.num_updates) == 10


def _named(model: SmallCNN) -> Any:
    from fastcnn.training.parameters import ordered

    return ordered(model)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_update_changes_nothing(name: str) -> None:
    parameters = FlatParameters(SmallCNN(3, filters=(4,) * 5, image_size=32))
    optimizer = OPTIMIZERS[name](parameters, LR, DECAY)
    parameters.gradient.fill_(1)
    before = parameters.values.clone()
    optimizer.step(torch.ones(()))
    assert torch.equal(parameters.values, before)
    assert float(optimizer.num_updates) == 0
    optimizer.step(torch.zeros(()))
    assert not torch.equal(parameters.values, before)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_has_a_rate_for_every_step_and_never_more_than_lr(name: str) -> None:
    for num_steps in (1, 2, 7, 100):
        rates = schedule(name, LR, num_steps, warmup_steps=num_steps // 3)
        assert rates.shape == (num_steps,)
        assert (rates > 0).all()
        assert rates.max() <= LR * (1 + 1e-6)


def test_step_drops_and_warm_up_rises() -> None:
    rates = schedule("step", 1.0, 9, decay_steps=3, decay_rate=0.5)
    assert rates.tolist() == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]
    rates = schedule("constant", 1.0, 6, warmup_steps=3)
    assert rates.tolist() == [0.25, 0.5, 0.75, 1, 1, 1]


def test_onecycle_is_torchs() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    peer = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=50)
    expected = []
    for _ in range(50):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        peer.step()
    torch.testing.assert_close(schedule("onecycle", LR, 50), torch.tensor(expected), rtol=1e-4, atol=1e-9)
