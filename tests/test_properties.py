"""Properties that hold for all values, tested with random ones."""

from itertools import islice

import numpy as np
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_faces import DDPMFacesScheduler
from ddpm_faces.data.batches import FaceBatches
from ddpm_faces.data.dataset import FaceDataset
from ddpm_faces.data.draws import draw_crops, draw_step
from ddpm_faces.scheduling_ddpm_faces import TIMESTEP_SPACINGS
from ddpm_faces.training.batch import Batch
from ddpm_faces.training.data import share_of


a_few = settings(deadline=None, derandomize=True, max_examples=200)
seeds = st.integers(0, 2**32)


@st.composite
def schedules(draw):
    """A number of timesteps, and a valid number of sampling steps."""
    num_train_timesteps = draw(st.integers(1, 2000))
    return num_train_timesteps, draw(st.integers(1, num_train_timesteps))


@a_few
@given(schedules(), st.sampled_from(TIMESTEP_SPACINGS))
def test_timesteps_descend_within_range_and_equal_diffusers(schedule, timestep_spacing):
    num_train_timesteps, num_inference_steps = schedule
    config = {"num_train_timesteps": num_train_timesteps, "timestep_spacing": timestep_spacing}
    ours = DDPMFacesScheduler(**config)
    ours.set_timesteps(num_inference_steps)

    timesteps = ours.timesteps.tolist()
    assert len(timesteps) == ours.num_inference_steps == num_inference_steps
    assert num_train_timesteps > timesteps[0]
    assert timesteps[-1] >= 0
    assert all(after < before for before, after in zip(timesteps[:-1], timesteps[1:], strict=True))
    if timestep_spacing == "logsnr":  # diffusers does not know it
        return
    theirs = DDPMScheduler(**config)
    theirs.set_timesteps(num_inference_steps)
    # The "trailing" timesteps of diffusers sometimes run past the end.
    assert timesteps == [t for t in theirs.timesteps.tolist() if t >= 0]


@st.composite
def layouts(draw):
    """The number of processes, of images per step on each, and of images per micro-batch."""
    num_processes, per_process = draw(st.integers(1, 9)), draw(st.integers(1, 12))
    return num_processes, per_process, draw(st.integers(1, per_process + 3))


def step(seed: int, images_seen: int, batch_size: int, share: slice) -> Batch:
    """One process's share of a step. The pixel of an image is its position in the batch."""
    images = torch.arange(batch_size).view(-1, 1, 1, 1)[share]
    names = [str(place) for place in range(batch_size)][share]
    draws = draw_step(seed, images_seen, batch_size, share, 300, (1, 1, 1))
    return Batch(images, images.flatten(), None, names, draws, epoch=0)


@a_few
@given(layouts(), seeds)
def test_each_image_is_used_once_with_its_own_draws_in_every_layout(layout, seed):
    num_processes, per_process, micro_batch_size = layout
    batch_size = num_processes * per_process
    shares = [share_of(batch_size, process, num_processes) for process in range(num_processes)]
    parts = [list(step(seed, 64, batch_size, share).split(micro_batch_size)) for share in shares]

    for of_one_process in parts:
        assert [part.is_last for part in of_one_process] == [False] * (len(of_one_process) - 1) + [True]
        assert max(map(len, of_one_process)) <= micro_batch_size
    whole, split = step(seed, 64, batch_size, slice(0, batch_size)), sum(parts, [])
    assert torch.equal(torch.cat([part.images for part in split]), whole.images)
    assert torch.equal(torch.cat([part.labels for part in split]), whole.labels)
    assert [name for part in split for name in part.names] == whole.names
    for name, expected in whole.draws._asdict().items():
        assert torch.equal(torch.cat([getattr(part.draws, name) for part in split]), expected), name
    crops = [draw_crops(seed, 64, batch_size, share) for share in shares]
    np.testing.assert_array_equal(np.concatenate(crops), draw_crops(seed, 64, batch_size, slice(0, batch_size)))


@st.composite
def interrupted_runs(draw):
    """The number of images, the batch size, the number of steps, and the steps after which the run is resumed."""
    batch_size = draw(st.integers(1, 8))
    num_steps = draw(st.integers(1, 20))
    return draw(st.integers(batch_size, 40)), batch_size, num_steps, draw(st.sets(st.integers(0, num_steps)))


def train(num_images: int, batch_size: int, seed: int, first: int, last: int) -> list[list]:
    """Return the images of some steps with their timesteps and noise, which determine the training."""
    dataset = FaceDataset(torch.arange(num_images, dtype=torch.uint8).view(-1, 1, 1, 1))
    batches = FaceBatches(dataset, batch_size, slice(0, batch_size), seed)
    batches.images_seen = first * batch_size
    steps = []
    for number, batch in enumerate(islice(batches.batches(), last - first), start=first):
        draws = draw_step(seed, number * batch_size, batch_size, slice(0, batch_size), 300, (1, 1, 1))
        steps.append([batch["names"], batch["images"].tolist(), draws.timesteps.tolist(), draws.noise.tolist()])
        assert batches.images_seen == (number + 1) * batch_size  # the state in a checkpoint
    return steps


@a_few
@given(interrupted_runs(), seeds)
def test_resumed_run_uses_the_images_and_draws_of_an_uninterrupted_one(run, seed):
    num_images, batch_size, num_steps, stops = run
    whole = train(num_images, batch_size, seed, 0, num_steps)
    marks = sorted({0, num_steps, *stops})
    resumed = [train(num_images, batch_size, seed, *pair) for pair in zip(marks[:-1], marks[1:], strict=True)]
    assert sum(resumed, []) == whole

    steps_per_epoch = num_images // batch_size
    for first in range(0, num_steps - steps_per_epoch + 1, steps_per_epoch):
        names = [name for names, *_ in whole[first : first + steps_per_epoch] for name in names]
        assert len(set(names)) == len(names) == steps_per_epoch * batch_size  # no image twice in an epoch
