"""Optimizers and schedules against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastcnn.network.small_cnn import SmallCNN
from fastcnn.training.optimizers import OPTIMIZERS, Muon
from fastcnn.training.parameters import FlatParameters
from fastcnn.training.schedules import SCHEDULES, schedule

LR, DECAY = 1 / 128, 1 / 8  # exact in fp32
PEERS: dict[str, Any] = {
    "adam": lambda groups: torch.optim.Adam(groups, LR),
    "adamw": lambda groups: torch.optim.AdamW(groups, LR),
    "sgd": lambda groups: torch.optim.SGD(groups, LR, momentum=0.9, nesterov=True),
    "muon": lambda groups: PlainMuon(*groups),
}


class PlainMuon:
    """Muon of all matrices but the last, the output layer's, and torch's AdamW of the rest, at 3e-3 as by default."""

    def __init__(self, weights: dict[str, Any], others: dict[str, Any]) -> None:
        *self.matrices, output = weights["params"]
        self.decay = weights["weight_decay"]
        self.velocities = [torch.zeros_like(p) for p in self.matrices]
        self.rest = torch.optim.AdamW(
            [{"params": [output], "weight_decay": self.decay}, others], float(torch.tensor(LR) * (3e-3 / LR))
        )

    @torch.no_grad()
    def step(self) -> None:
        self.rest.step()
        for p, velocity in zip(self.matrices, self.velocities, strict=True):
            velocity.lerp_(p.grad, 0.1)
            update = newton_schulz(p.grad.lerp(velocity, 0.9).flatten(1)).view_as(p)
            p.mul_(1 - LR * self.decay)
            p.sub_(update, alpha=LR * max(1, len(p) / p[0].numel()) ** 0.5)


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    if len(matrix) > matrix.shape[1]:
        return newton_schulz(matrix.T).T
    x = matrix / matrix.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def test_every_optimizer_has_a_peer() -> None:
    assert set(PEERS) == set(OPTIMIZERS)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_twenty_updates_equal_torchs(name: str, decay: float, dtype: torch.dtype, tolerance: float) -> None:
    """Weight decay is for weights of convolutions and dense layers only."""
    torch.manual_seed(0)
    model, plain = (SmallCNN(3, filters=(4, 4, 8, 8, 4), image_size=32, dense_neurons=8).to(dtype) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    parameters = FlatParameters(model, dtype)
    optimizer = OPTIMIZERS[name](parameters, LR, decay)
    groups = [
        {"params": [p for p in plain.parameters() if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in plain.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    peer = PEERS[name](groups)
    for _ in range(20):
        gradients = [torch.randn_like(p) for p in parameters.inputs]
        parameters.set_gradients(gradients)
        optimizer.step(torch.zeros(()))
        by_name = {key: g for (key, _), g in zip(_named(model), gradients, strict=True)}
        for key, p in plain.named_parameters():
            p.grad = by_name[key].clone()
        peer.step()
    for (key, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=key)
    assert float(optimizer.num_updates) == 20


def test_muon_updates_a_dense_layer_as_torchs_does() -> None:
    """torch's orthogonalises in bf16: it is right to 1 in 100 or so."""
    torch.manual_seed(0)
    model = SmallCNN(3, filters=(4,) * 5, image_size=64, dense_neurons=24)
    plain = torch.nn.Parameter(model.dense.weight.detach().clone())
    parameters = FlatParameters(model)
    ours = Muon(parameters, LR, DECAY, 0.95)
    theirs = torch.optim.Muon([plain], lr=LR, weight_decay=DECAY, momentum=0.95)
    for _ in range(5):
        gradients = [torch.randn_like(p) for p in parameters.inputs]
        plain.grad = next(g for (key, _), g in zip(_named(model), gradients, strict=True) if key == "dense.weight")
        before = plain.detach().clone()
        parameters.set_gradients(gradients)
        ours.step(torch.zeros(()))
        theirs.step()
        moved = (plain - before).norm()
        assert (model.dense.weight - plain).norm() < 0.05 * moved
        with torch.no_grad():
            model.dense.weight.copy_(plain)


def test_fixed_norm_keeps_each_matrix_at_the_root_of_its_rows() -> None:
    torch.manual_seed(0)
    model = SmallCNN(3, filters=(4, 8, 4, 8, 4), image_size=32, dense_neurons=8)
    parameters = FlatParameters(model)
    optimizer = Muon(parameters, 1e-6, fixed_norm=True)
    parameters.gradient.normal_()
    optimizer.step(torch.zeros(()))
    for name, p in model.named_parameters():
        if p.dim() > 1:
            assert (abs(p.norm() - len(p) ** 0.5) < 1e-4) == (name != "output.weight"), name


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


def test_triangular_rises_for_a_fifth_and_falls_linearly() -> None:
    rates = schedule("triangular", 1.0, 10)
    torch.testing.assert_close(rates, torch.tensor([1 / 2, 1, *(left / 9 for left in range(8, 0, -1))]))


def test_onecycle_is_torchs() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    peer = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=50)
    expected = []
    for _ in range(50):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        peer.step()
    torch.testing.assert_close(schedule("onecycle", LR, 50), torch.tensor(expected), rtol=1e-4, atol=1e-9)
