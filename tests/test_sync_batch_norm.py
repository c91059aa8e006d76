"""Synchronised BatchNorm is compared with `nn.BatchNorm2d` in one process, on the whole batch."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import tiny_unet
from forked import PRELOAD
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddpm_faces.training.sync_batch_norm import SyncBatchNorm2d, convert_sync_batch_norm


# The number of samples on each process, and the dtype of the network.
CASES = {
    "even": ((2, 2), torch.float64),
    "uneven": ((4, 1), torch.float64),
    "float32": ((4, 1), torch.float32),
    "checkpointed": ((3, 2), torch.float64),
    "four processes, one idle": ((3, 0, 2, 1), torch.float64),
}


def make_unet(case: str):
    torch.manual_seed(0)
    overrides = {"block_types": ("conv",), "mid_block_type": None, "out_block_type": "conv"}
    unet = tiny_unet(**overrides).to(CASES[case][1], memory_format=torch.channels_last).train()
    if case == "checkpointed":
        unet.enable_gradient_checkpointing()
    return unet


def make_batch(case: str) -> torch.Tensor:
    shares, dtype = CASES[case]
    return torch.randn(sum(shares), 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


def step(unet: nn.Module, batch: torch.Tensor, timesteps: torch.Tensor, global_batch_size: int) -> dict:
    """Run a forward and a backward pass. The loss is the mean over the batch of all processes."""
    batch = batch.clone().requires_grad_()
    output = unet(batch, timesteps).sample
    # Unlike a plain mean, this loss has gradients: the sum of BatchNorm's outputs is constant.
    (output**3 + output).flatten(start_dim=1).mean(dim=1).sum().div(global_batch_size).backward()
    network = getattr(unet, "module", unet)
    return {
        "output": output.detach(),
        "input_gradient": batch.grad,
        "gradients": {name: parameter.grad for name, parameter in network.named_parameters()},
        "buffers": dict(network.named_buffers()),
    }


def make_layer(momentum: float | None = 0.1, **kwargs) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(4, momentum=momentum, **kwargs)


def make_inputs(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Inputs far from zero, where the variance as E[x^2] - E[x]^2, or in bfloat16, would be noise."""
    return (torch.randn(6, 4, 5, 3, generator=torch.Generator().manual_seed(2)) + 100).to(dtype)


LAYERS = {
    "momentum 0": {"momentum": 0.0},
    "cumulative": {"momentum": None},
    "not affine": {"affine": False},
    "no running statistics": {"track_running_stats": False},
}


def run_process(rank: int, num_processes: int, folder: str) -> None:
    """Compute all cases for this number of processes, and save the results for the tests."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=num_processes,
        timeout=timedelta(seconds=60),
    )
    results = {}
    for case, (shares, _) in CASES.items():
        if len(shares) != num_processes:
            continue
        first = sum(shares[:rank])
        mine = slice(first, first + shares[rank])
        unet = DistributedDataParallel(convert_sync_batch_norm(make_unet(case)))
        timesteps = torch.arange(sum(shares))
        # DDP averages gradients over processes, so each loss is multiplied by `num_processes`.
        results[case] = step(unet, make_batch(case)[mine], timesteps[mine], sum(shares) / num_processes)

    if num_processes == 2:
        mine = slice(0, 4) if rank == 0 else slice(4, 6)
        for case, kwargs in LAYERS.items():
            layer = convert_sync_batch_norm(make_layer(**kwargs).double())
            outputs = [layer(scale * make_inputs()[mine]).detach() for scale in (1, 2)]
            results[case] = {"output": torch.cat(outputs), "buffers": layer.state_dict()}
        layer = convert_sync_batch_norm(make_layer())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = layer(make_inputs(torch.bfloat16)[mine])
        results["bfloat16"] = {"output": output.detach(), "buffers": layer.state_dict()}
        if rank == 0:  # the other process does not take part, so an `all_reduce` would hang
            results["evaluation"] = {"output": layer.eval()(make_inputs(torch.float32)).detach()}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results_of(tmp_path_factory):
    """Return the results of all processes. Each number of processes runs once."""
    # There is one fork server for all tests. Started with other imports, it would slow down each training run.
    mp.get_context("forkserver").set_forkserver_preload(PRELOAD)
    results = {}

    def run(num_processes: int) -> list[dict]:
        if num_processes not in results:
            folder = tmp_path_factory.mktemp("processes")
            args = (num_processes, str(folder))
            mp.start_processes(run_process, args, nprocs=num_processes, start_method="forkserver")
            results[num_processes] = [torch.load(folder / f"{rank}.pt") for rank in range(num_processes)]
        return results[num_processes]

    return run


@pytest.mark.parametrize("case", CASES)
def test_training_equals_one_process_on_the_whole_batch(case, results_of):
    shares, dtype = CASES[case]
    results = [result[case] for result in results_of(len(shares))]
    batch = make_batch(case)
    expected = step(make_unet(case), batch, torch.arange(len(batch)), len(batch))
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 2e-5}

    output = torch.cat([result["output"] for result in results])
    torch.testing.assert_close(output, expected["output"], **tolerance)
    # The gradient of the loss that DDP averages, which is the global one times the number of processes.
    input_gradient = torch.cat([result["input_gradient"] for result in results]) / len(shares)
    torch.testing.assert_close(input_gradient, expected["input_gradient"], **tolerance)
    for result in results:
        torch.testing.assert_close(result["gradients"], expected["gradients"], **tolerance)
        torch.testing.assert_close(result["buffers"], expected["buffers"], **tolerance)


@pytest.mark.parametrize("case", LAYERS)
def test_arguments_of_the_layer(case, results_of):
    layer = make_layer(**LAYERS[case]).double()
    expected = [layer(scale * make_inputs()).detach() for scale in (1, 2)]
    results = [result[case] for result in results_of(2)]
    output = [
        torch.cat(parts) for parts in zip(results[0]["output"].split(4), results[1]["output"].split(2), strict=True)
    ]
    torch.testing.assert_close(output, expected)
    for result in results:
        torch.testing.assert_close(result["buffers"], layer.state_dict())


def test_statistics_are_float32_under_bfloat16_autocast(results_of):
    layer = make_layer()
    expected = layer(make_inputs(torch.bfloat16).float()).detach()
    results = [result["bfloat16"] for result in results_of(2)]
    output = torch.cat([result["output"] for result in results])
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected.bfloat16(), rtol=1e-2, atol=1e-3)  # at most a rounding error
    torch.testing.assert_close(results[0]["buffers"], layer.state_dict(), rtol=1e-5, atol=0)
    assert results[0]["buffers"]["running_var"].dtype == torch.float32


def test_evaluation_equals_one_process(results_of):
    results = results_of(2)[0]
    layer = make_layer().eval()
    layer.load_state_dict(results["bfloat16"]["buffers"])
    assert torch.equal(results["evaluation"]["output"], layer(make_inputs(torch.float32)))


def test_conversion_keeps_parameters_and_state():
    unet, plain = make_unet("even"), make_unet("even")
    parameters = list(unet.parameters())
    assert convert_sync_batch_norm(unet) is unet
    assert all(before is after for before, after in zip(parameters, unet.parameters(), strict=True))
    assert list(unet.state_dict()) == list(plain.state_dict())
    norms = [module for module in unet.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(type(norm) is SyncBatchNorm2d for norm in norms)

    # In one process, it equals the original layer.
    batch, timesteps = make_batch("even"), torch.arange(4)
    torch.testing.assert_close(step(unet, batch, timesteps, 4), step(plain, batch, timesteps, 4), rtol=0, atol=0)
