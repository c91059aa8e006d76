from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_unet

from ddpm_faces import DDPMFacesObjective, DDPMFacesScheduler
from ddpm_faces.data import FaceDataset, to_samples
from ddpm_faces.evaluation.held_out import bin_names, held_out_losses, timestep_bins


@pytest.fixture
def dataset() -> FaceDataset:
    generator = torch.Generator().manual_seed(3)
    return FaceDataset(torch.randint(0, 256, (7, 3, 16, 16), dtype=torch.uint8, generator=generator))


@pytest.fixture
def objective() -> DDPMFacesObjective:
    return DDPMFacesObjective(DDPMFacesScheduler())


def test_bins():
    assert timestep_bins(300).tolist() == list(range(0, 301, 30))
    assert bin_names(300)[0] == "000-029"
    assert bin_names(300)[-1] == "270-299"
    assert bin_names(3) == ["0-0", "1-1", "2-2"]
    assert timestep_bins(25)[-1] == 25


def test_each_image_is_evaluated_once_per_bin_with_its_own_noise(dataset, objective):
    seen = []

    def unet(sample, timesteps, **kwargs):
        seen.extend(zip(sample, timesteps.tolist(), strict=True))
        return SimpleNamespace(sample=torch.zeros_like(sample))

    losses = held_out_losses(Accelerator(cpu=True), unet, objective, dataset, batch_size=4)
    assert losses.shape == (7, 10)
    samples = to_samples(dataset.images)
    for case, (noisy, timestep) in enumerate(seen):
        picture, number = divmod(case, 10)
        assert 30 * number <= timestep < 30 * (number + 1)
        # The error of a network that predicts zeros is the noise itself.
        alpha_bar = objective.scheduler.alphas_cumprod[timestep]
        noise = (noisy - alpha_bar.sqrt() * samples[picture]) / (1 - alpha_bar).sqrt()
        torch.testing.assert_close(losses[picture, number], noise.square().mean(), rtol=1e-2, atol=1e-3)
    assert len({round(loss, 6) for loss in losses.flatten().tolist()}) == 70


def test_losses_do_not_depend_on_batches_and_random_state_is_unchanged(dataset, objective):
    unet = tiny_unet()
    state = torch.get_rng_state()
    losses = [held_out_losses(Accelerator(cpu=True), unet, objective, dataset, size) for size in (70, 70, 3)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])


@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_share_the_cases(dataset, objective, num_processes):
    """The processes run one after the other, and their results are combined."""
    unet = tiny_unet()
    expected = held_out_losses(Accelerator(cpu=True), unet, objective, dataset, 8)
    parts = []

    class Gathered(Exception):
        pass

    for index in range(num_processes):

        def gather(tensor):
            parts.append(tensor)
            raise Gathered

        one = SimpleNamespace(num_processes=num_processes, process_index=index, device="cpu", gather=gather)
        with pytest.raises(Gathered):
            held_out_losses(one, unet, objective, dataset, 8)
    every = SimpleNamespace(
        num_processes=num_processes, process_index=0, device="cpu", gather=lambda t: torch.cat(parts)
    )
    torch.testing.assert_close(held_out_losses(every, unet, objective, dataset, 8), expected)
