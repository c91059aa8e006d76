import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ddpm_faces.training.ema import EMA


FINITE, NOT_FINITE = torch.tensor(True), torch.tensor(False)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def disturb(network: nn.Module) -> None:
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor))


def test_equals_pytorchs_ema_of_weights_and_buffers(network):
    ema, theirs = EMA(network), AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    theirs.update_parameters(network)  # PyTorch's first update is a copy
    for _ in range(5):
        disturb(network)
        ema.update(0.9, FINITE)
        theirs.update_parameters(network)
    expected = theirs.module.state_dict()
    assert ema.shadow.keys() == expected.keys() - {"1.num_batches_tracked"}
    for name, tensor in ema.shadow.items():
        torch.testing.assert_close(tensor, expected[name])


def test_skipped_steps_leave_the_ema_unchanged(network):
    ema = EMA(network)
    disturb(network)
    before = {name: tensor.clone() for name, tensor in ema.shadow.items()}
    ema.update(0.5, NOT_FINITE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ema.shadow.items())


def test_swapping_in_and_out_is_exact(network):
    ema = EMA(network)
    disturb(network)
    ema.update(0.3, FINITE)
    raw = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    averaged = {name: tensor.clone() for name, tensor in ema.shadow.items()}
    with ema.swapped_in():
        inside = network.state_dict()
        assert all(torch.equal(inside[name], tensor) for name, tensor in averaged.items())
    assert all(torch.equal(tensor, raw[name]) for name, tensor in network.state_dict().items())
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in ema.shadow.items())


def test_restart_copies_the_loaded_weights(network):
    ema = EMA(network)
    disturb(network)
    ema.restart()
    state = network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ema.shadow.items())
