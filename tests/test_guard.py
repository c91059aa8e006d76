import pytest
import torch
from accelerate import Accelerator
from torch import nn

from ddpm_faces.training.guard import STEPS_UNTIL_CHECK, GradientGuard


def make(normalised: bool = False):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)] if normalised else [nn.Conv2d(3, 4, 1)]
    network = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=True)
    network, optimizer = Accelerator(cpu=True).prepare(network, optimizer)
    return network, optimizer, GradientGuard(network, optimizer)


def step(network, optimizer, guard, value: float, seed: int) -> None:
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    x[0, 0, 0, 0] *= value
    network(x).square().mean().backward()
    guard.step(nn.utils.clip_grad_norm_(network.parameters(), 1.0))
    optimizer.zero_grad()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("normalised", [False, True])
def test_nonfinite_steps_change_nothing(normalised, value):
    """Weights, statistics, Adam's moments and its step count equal those after the good steps only."""
    runs = []
    for values in ((1, 1, 1), (1, value, 1, value, 1)):
        network, optimizer, guard = make(normalised)
        good = 0
        for number in values:
            step(network, optimizer, guard, number, seed=good if number == 1 else 100)
            good += number == 1
        runs.append((network.state_dict(), optimizer.state_dict()["state"]))
    for name, tensor in runs[0][0].items():
        if name.endswith("num_batches_tracked"):
            continue
        assert torch.equal(tensor, runs[1][0][name]), name
    for index, state in runs[0][1].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, runs[1][1][index][name]), name


def test_loaded_statistics_are_restored_after_a_skipped_step():
    network, optimizer, guard = make(normalised=True)
    network[1].running_mean.fill_(5.0)
    guard.remember()
    step(network, optimizer, guard, float("nan"), 0)
    assert network[1].running_mean.tolist() == [5.0] * 4


def train_partly(network, optimizer, guard, count: int) -> None:
    """Take steps in which the first layer gets no gradient but zero."""
    for seed in range(count):
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        (network[1](network[0](x).detach()).square().mean() + 0 * network[0].weight.sum()).backward()
        guard.step(nn.utils.clip_grad_norm_(network.parameters(), 1.0))
        optimizer.zero_grad()


def test_untrained_parameters_are_reported_once(caplog):
    network, optimizer, guard = make(normalised=True)
    train_partly(network, optimizer, guard, STEPS_UNTIL_CHECK - 1)
    assert not caplog.records
    train_partly(network, optimizer, guard, 2 * STEPS_UNTIL_CHECK)
    (record,) = caplog.records
    assert "gradient of 2 of 4 parameters" in record.getMessage()
    assert "not trained: 0.weight, 0.bias." in record.getMessage()


def test_trained_parameters_are_not_reported(caplog):
    network, optimizer, guard = make(normalised=True)
    network[0].bias.requires_grad_(False)
    for seed in range(STEPS_UNTIL_CHECK):
        step(network, optimizer, guard, 1.0, seed)
    assert not caplog.records
