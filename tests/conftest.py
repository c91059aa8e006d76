import os
import shutil
import signal
import tempfile
import threading


# The networks here are so small that a second thread only makes them slower, and threads that spin while they wait
# take the other worker's core. Torch reads both variables on import, here and in each process that a test starts.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

# Training uses all cores that it may use, so each worker of pytest-xdist gets its share of them.
ALL_CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
if ALL_CORES and "PYTEST_XDIST_WORKER" in os.environ:
    number, count = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    share = sorted(ALL_CORES)[number::count]
    os.sched_setaffinity(0, share or ALL_CORES)

# A background job of a shell ignores Ctrl-C, and so would the processes that the tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
import torch  # noqa: E402
from hub_client import HubClient  # noqa: E402
from hub_server import HubServer  # noqa: E402


# The tests have their own caches, which start empty and leave nothing in the home folder.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="ddpm-faces-tests-")

from ddpm_faces import DDPMFacesPipeline, DDPMFacesScheduler, DDPMFacesUNet  # noqa: E402


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture
def all_cores():
    """For a test of how cores are used."""
    share = os.sched_getaffinity(0) if ALL_CORES else set()
    if share:
        os.sched_setaffinity(0, ALL_CORES)
    yield
    if share:
        os.sched_setaffinity(0, share)


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


# The Hub: the tests of a worker share these fixtures and the published models.


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
