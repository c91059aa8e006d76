import math

import numpy as np
import torch

from ddpm_faces.data.draws import counted_normal, draw_crops, draw_step


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


def test_steps_and_seeds_differ_and_the_global_state_is_unchanged():
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
    assert abs(draws.dropouts.mean() - 0.5) < 4 * 12**-0.5 / 64
    pictures = draws.noise.flatten(1)
    assert abs(pictures.mean()) < 4 / pictures.numel() ** 0.5
    assert abs(pictures.std() - 1) < 0.02
    assert abs(torch.corrcoef(pictures[:, :2].T)[0, 1]) < 4 / 64  # within an image
    assert abs((pictures[1:] * pictures[:-1]).mean()) < 4 / pictures.numel() ** 0.5  # and between images


def test_low_discrepancy_changes_only_the_timesteps():
    for images_seen, seed in ((0, 0), (64, 1), (10**9, 2)):
        drawn = draw(images_seen, slice(0, 30), 30, seed)
        spread = draw(images_seen, slice(0, 30), 30, seed, low_discrepancy=True)
        # 30 of 300: a grid would have gaps of 10 only; independent draws would have a gap of about 40.
        ends = torch.tensor([0, 300])
        gaps = torch.cat([spread.timesteps, ends]).sort().values.diff()
        assert 0 <= spread.timesteps.min()
        assert spread.timesteps.max() < 300
        assert gaps.max() <= 20
        assert all(torch.equal(a, b) for a, b in zip(spread[1:], drawn[1:], strict=True))
        # Image k gets the same timestep for any batch size.
        rest = draw(images_seen + 10, slice(5, 20), 20, seed, low_discrepancy=True)
        assert torch.equal(rest.timesteps, spread.timesteps[15:])
    # In the long run, all timesteps are equally frequent.
    many = draw(0, slice(0, 30_000), 30_000, low_discrepancy=True).timesteps.bincount(minlength=300)
    assert many.min() >= 97
    assert many.max() <= 103
    assert not torch.equal(draw(low_discrepancy=True).timesteps, draw(seed=1, low_discrepancy=True).timesteps)


# The noise of GPUs, which a CPU can compute as well


def splitmix64(state: int, number: int) -> list[int]:
    """The reference, with integers of any size."""
    outputs = []
    for _ in range(number):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        outputs.append(z ^ (z >> 31))
    return outputs


def test_counted_normal_is_splitmix64_through_box_muller():
    # The first outputs for the seed 1234567, as published with many implementations.
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    seeds = [1234567, 0, 2**63 - 1, 42]
    expected = []
    for seed in seeds:
        for bits in splitmix64(seed, 4):
            radius = math.sqrt(-2 * math.log(((bits >> 32) + 0.5) / 2**32))
            angle = 2 * math.pi * (bits % 2**32) / 2**32
            expected += [radius * math.cos(angle), radius * math.sin(angle)]
    drawn = counted_normal(torch.tensor(seeds), (2, 4))
    torch.testing.assert_close(drawn.flatten(), torch.tensor(expected), atol=2e-6, rtol=1e-5)
    odd = counted_normal(torch.tensor(seeds), (7,))
    torch.testing.assert_close(odd, drawn.flatten(1)[:, :7])


def test_counted_normal_does_not_depend_on_the_rest_of_the_batch():
    seeds = torch.from_numpy(np.random.default_rng(0).integers(2**63, size=9))
    whole = counted_normal(seeds, SHAPE)
    for first in range(9):
        assert torch.equal(counted_normal(seeds[first : first + 1], SHAPE)[0], whole[first])
    assert counted_normal(seeds[:0], SHAPE).shape == (0, *SHAPE)


def test_counted_normal_is_normal_and_independent():
    seeds = torch.from_numpy(np.random.default_rng(3).integers(2**63, size=256))
    for chosen in (seeds, torch.arange(256)):  # and with consecutive seeds
        z = counted_normal(chosen, (3, 32, 32)).double()
        number = z.numel()
        moments = [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]  # power, mean, variance
        assert all(abs((z**k).mean() - mean) < 4.5 * (variance / number) ** 0.5 for k, mean, variance in moments)
        quantiles = torch.special.ndtr(z).flatten().sort().values
        assert (quantiles - (torch.arange(number) + 0.5) / number).abs().max() < 2 / number**0.5  # Kolmogorov-Smirnov
        flat = z.flatten(1)
        products = (flat[:, 1:] * flat[:, :-1], flat[:, 2:] * flat[:, :-2], flat[1:] * flat[:-1])
        assert all(abs(product.mean()) < 4.5 / product.numel() ** 0.5 for product in products)
