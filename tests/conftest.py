import os
import shutil
import tempfile

import pytest
import torch
from hub_client import HubClient
from hub_server import HubServer


# The tests have their own caches, which start empty and leave nothing in the home folder.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="ddpm-faces-tests-")

from ddpm_faces import DDPMFacesPipeline, DDPMFacesScheduler, DDPMFacesUNet  # noqa: E402


# The networks here are so small that threads cost more than they save, above all on a busy machine.
torch.set_num_threads(1)


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tiny_unet(**overrides) -> DDPMFacesUNet:
    """A network that runs in milliseconds, in evaluation mode, without zero-initialized layers."""
    config = {
        "sample_size": 16,
        "block_out_channels": (8, 16),
        "block_types": ("resnet",),
        "mid_block_type": "resnet_attn",
        "out_block_type": "norm_conv",
        "norm_num_groups": 4,
    }
    unet = DDPMFacesUNet(**{**config, **overrides})
    with torch.no_grad():
        for parameter in unet.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return unet.eval()


@pytest.fixture
def pipeline() -> DDPMFacesPipeline:
    pipeline = DDPMFacesPipeline(tiny_unet(), DDPMFacesScheduler(num_train_timesteps=20))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# The Hub: tests that use it share one `xdist_group`, because they share these fixtures and the published models.


@pytest.fixture(scope="session")
def server():
    with HubServer() as server:
        yield server
        assert server.violations == []
        server.check_secrets()


@pytest.fixture(autouse=True)
def healed(request):
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").heal()


@pytest.fixture(scope="session")
def client(server):
    with HubClient(server) as client:
        yield client


@pytest.fixture(scope="session")
def bare_client(server):
    """A client without this package."""
    with HubClient(server, package=False) as client:
        yield client
