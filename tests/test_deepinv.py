"""Operators and denoisers together with deepinv, which is not a dependency: it needs torchvision."""

import pytest
import torch
from conftest import tiny_unet

from ddpm_faces import DDPMFacesRestorePipeline, DDPMFacesScheduler, Inpaint, PhysicsOperator


deepinv = pytest.importorskip("deepinv", reason="deepinv is not installed")
SHAPE = (3, 16, 16)


@pytest.fixture
def restore() -> DDPMFacesRestorePipeline:
    restore = DDPMFacesRestorePipeline(tiny_unet(), DDPMFacesScheduler(num_train_timesteps=50))
    restore.set_progress_bar_config(disable=True)
    return restore


def a_mask() -> torch.Tensor:
    return (torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) < 0.5).float()


def physics(name: str):
    if name == "mask":
        return deepinv.physics.Inpainting(SHAPE, mask=1 - a_mask()[None])
    if name == "reduction":
        return deepinv.physics.Downsampling(img_size=SHAPE, factor=2, filter="bilinear")
    if name == "random sums":
        return deepinv.physics.CompressedSensing(m=100, img_size=SHAPE)
    kernel = deepinv.physics.functional.blur.gaussian_blur(sigma=1.0)
    return deepinv.physics.BlurFFT(img_size=SHAPE, filter=kernel)


@pytest.mark.parametrize("name", ["mask", "reduction", "blur", "random sums"])
def test_restorations_explain_what_deepinv_observes(restore, name):
    operator = PhysicsOperator(physics(name), SHAPE)
    face = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    observed = operator(face)
    restored = restore(observed, operator, 0.0, 10, 1, torch.Generator().manual_seed(0), "latent").images
    torch.testing.assert_close(operator(restored), observed, rtol=0, atol=1e-3)
    # In its own range, deepinv sees the same.
    torch.testing.assert_close(operator.from_unit_range(operator.physics.A(face / 2 + 0.5)), observed)


def test_a_mask_of_deepinv_does_the_same_as_ours(restore):
    face = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    results = []
    for operator in (Inpaint(a_mask()), PhysicsOperator(physics("mask"), SHAPE)):
        arguments = (operator(face), operator, 0.1, 10, 1, torch.Generator().manual_seed(0), "latent")
        results.append(restore(*arguments).images)
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)


@pytest.mark.parametrize("algorithm", ["DiffPIR", "DPS"])
def test_algorithms_of_deepinv_take_our_denoiser(restore, algorithm):
    observer, denoiser = physics("blur"), restore.as_denoiser()
    face = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(1))
    if algorithm == "DPS":
        solver = deepinv.sampling.DPS(denoiser, num_steps=5)
    else:
        solver = deepinv.sampling.DiffPIR(denoiser, deepinv.optim.L2(), max_iter=5, device="cpu")
    restored = solver(observer.A(face), observer)
    assert restored.shape == face.shape
    assert restored.isfinite().all()
