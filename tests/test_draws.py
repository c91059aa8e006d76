import numpy as np
import torch

from ddpm_faces.data.draws import draw_crops, draw_step


SHAPE = (3, 4, 5)


def draw(images_seen: int = 64, share: slice = slice(0, 8), batch_size: int = 8, seed: int = 0, **options):
    return draw_step(seed, images_seen, batch_size, share, 300, SHAPE, **options)


def test_shares_of_processes_are_parts_of_the_batch():
    whole = draw()
    for first in (0, 4):
        part = draw(share=slice(first, first + 4))
        for name in whole._fields:
            assert torch.equal(getattr(part, name), getattr(whole, name)[first : first + 4]), name
    assert torch.equal(torch.cat([part.noise for part in whole.split(3)]), whole.noise)
    crops = draw_crops(0, 64, 8, slice(0, 8))
    np.testing.assert_array_equal(crops[4:], draw_crops(0, 64, 8, slice(4, 8)))


def test_steps_and_seeds_draw_anew_and_the_global_state_is_untouched():
    state = torch.get_rng_state()
    draws = [draw(), draw(images_seen=72), draw(seed=1)]
    assert torch.equal(torch.get_rng_state(), state)
    for name in draws[0]._fields:
        values = [getattr(d, name) for d in draws]
        assert not torch.equal(values[0], values[1])
        assert not torch.equal(values[0], values[2])


def test_distributions():
    draws = draw_step(0, 0, 4096, slice(0, 4096), 300, SHAPE)
    assert draws.timesteps.min() == 0
    assert draws.timesteps.max() == 299
    assert abs(draws.timesteps.float().mean() - 149.5) < 4 * 86.6 / 64
    assert abs(draws.flips.float().mean() - 0.5) < 4 * 0.5 / 64
    pictures = draws.noise.flatten(1)
    assert abs(pictures.mean()) < 4 / pictures.numel() ** 0.5
    assert abs(pictures.std() - 1) < 0.02
    assert abs(torch.corrcoef(pictures[:, :2].T)[0, 1]) < 4 / 64  # within a picture
    assert abs((pictures[1:] * pictures[:-1]).mean()) < 4 / pictures.numel() ** 0.5  # and between pictures


def test_low_discrepancy_spreads_timesteps_and_nothing_else():
    for images_seen, seed in ((0, 0), (64, 1), (10**9, 2)):
        drawn = draw(images_seen, slice(0, 30), 30, seed)
        spread = draw(images_seen, slice(0, 30), 30, seed, low_discrepancy=True)
        # 30 of 300: were they a grid, all gaps would be 10; were each drawn by itself, one of 40 would be expected.
        ends = torch.tensor([0, 300])
        gaps = torch.cat([spread.timesteps, ends]).sort().values.diff()
        assert 0 <= spread.timesteps.min()
        assert spread.timesteps.max() < 300
        assert gaps.max() <= 20
        assert all(torch.equal(a, b) for a, b in zip(spread[1:], drawn[1:], strict=True))
        # Whatever the size of the batches, image k meets the same timestep.
        rest = draw(images_seen + 10, slice(5, 20), 20, seed, low_discrepancy=True)
        assert torch.equal(rest.timesteps, spread.timesteps[15:])
    # In the long run all timesteps are met equally often.
    many = draw(0, slice(0, 30_000), 30_000, low_discrepancy=True).timesteps.bincount(minlength=300)
    assert many.min() >= 97
    assert many.max() <= 103
    assert not torch.equal(draw(low_discrepancy=True).timesteps, draw(seed=1, low_discrepancy=True).timesteps)
