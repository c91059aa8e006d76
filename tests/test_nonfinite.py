import pytest
import torch
from accelerate import Accelerator
from torch import nn

from ddpm_faces.training.guard import NonFiniteGuard


def make(normalised: bool = False):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)] if normalised else [nn.Conv2d(3, 4, 1)]
    network = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=True)
    network, optimizer = Accelerator(cpu=True).prepare(network, optimizer)
    return network, optimizer, NonFiniteGuard(network, optimizer)


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
