"""The search is compared with brute force, and the audit is tested with planted copies."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddpm_faces import DDPMFacesPipeline, DDPMFacesScheduler, DrawnFaces
from ddpm_faces.data import picture_to_tensor
from ddpm_faces.evaluation import copies, neighbours
from ddpm_faces.evaluation.copies import (
    AuditReport,
    audit,
    audit_model,
    closest_pairs_picture,
    exceedance_p_value,
    nearest,
    wilson_interval,
)


HEIGHT, WIDTH = 20, 24
NUM_SAMPLES, NUM_HELD_OUT, NUM_TRAIN, NUM_PLANTED = 120, 100, 300, 12


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.round().clamp(0, 255).to(torch.uint8)


def spots(num_images: int, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(num_images, 3, *size, generator=generator)
    return F.interpolate(noise, size=(HEIGHT, WIDTH), mode="bicubic")


def pictures(num_images: int, seed: int = 0) -> torch.Tensor:
    """Variations of one symmetric image that differ in brightness, contrast and detail, like photos."""
    common = spots(1, (10, 12), torch.Generator().manual_seed(1000))
    generator = torch.Generator().manual_seed(seed)
    brightness, contrast, detail = torch.randn(3, num_images, 1, 1, 1, generator=generator)
    pixels = 0.7 * (common + common.flip(-1)) + spots(num_images, (2, 2), generator)
    pixels += 0.3 * detail.exp() * spots(num_images, (10, 12), generator)
    return to_uint8(128 + 20 * brightness + 20 * (0.4 * contrast).exp() * pixels)


def blurred(images: torch.Tensor) -> torch.Tensor:
    return to_uint8(F.avg_pool2d(F.pad(images.float(), (1, 1, 1, 1), mode="reflect"), 3, stride=1))


def noisy(images: torch.Tensor) -> torch.Tensor:
    return to_uint8(images + 4 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0)))


class RandomProjection:
    """Stands in for a feature network: one fixed layer."""

    name = "random projection"
    resize = "none"

    def __init__(self):
        self.weights = torch.randn(3 * HEIGHT * WIDTH, 64, generator=torch.Generator().manual_seed(7)) / 1000

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return (images.flatten(start_dim=1).float() @ self.weights).relu()


@pytest.fixture(scope="module")
def faces() -> dict[str, torch.Tensor]:
    """The three sets of images of an audit, without any copies."""
    parts = pictures(NUM_SAMPLES + NUM_TRAIN + NUM_HELD_OUT).split([NUM_SAMPLES, NUM_TRAIN, NUM_HELD_OUT])
    return dict(zip(("samples", "train", "held_out"), parts, strict=True))


def with_copies(faces: dict[str, torch.Tensor], change=lambda images: images, number: int = NUM_PLANTED):
    """The same sets, with training image 3 i + 1 instead of sample i."""
    samples = faces["samples"].clone()
    samples[:number] = change(faces["train"][1 : 3 * number + 1 : 3])
    return {**faces, "samples": samples}


@pytest.fixture(scope="module")
def mirrored_copies(faces) -> tuple[dict[str, torch.Tensor], AuditReport]:
    copied = with_copies(faces, lambda images: images.flip(-1))
    return copied, audit(**copied, extractor=RandomProjection())


# The search


def brute_force(queries: np.ndarray, train: np.ndarray, mirrored: np.ndarray, num_neighbours: int) -> list[tuple]:
    """Compare one pair at a time, in float64."""
    centre = np.concatenate([train, mirrored]).mean(axis=0)
    queries, train, mirrored = (unit_rows(rows - centre) for rows in (queries, train, mirrored))
    found = []
    for query in queries:
        upright, flipped = (np.array([math.dist(query, row) for row in side]) for side in (train, mirrored))
        distances = np.minimum(upright, flipped)
        index = int(distances.argmin())
        mean = np.sort(distances)[:num_neighbours].mean()
        found.append((index, bool(flipped[index] < upright[index]), distances[index], distances[index] / mean))
    return found


def unit_rows(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def standardised(images: torch.Tensor) -> np.ndarray:
    rows = images.flatten(start_dim=1).double().numpy()
    return unit_rows(rows - rows.mean(axis=1, keepdims=True))


@pytest.mark.parametrize("rows_at_a_time", [7, 1024])
@pytest.mark.parametrize("space", ["pixels", "features"])
def test_search_equals_brute_force(faces, monkeypatch, rows_at_a_time, space):
    monkeypatch.setattr(neighbours, "_ROWS", rows_at_a_time)
    sides = faces["samples"][:20], faces["train"], faces["train"].flip(-1)
    if space == "pixels":
        rows, expected_rows = [images.flatten(start_dim=1) for images in sides], map(standardised, sides)
    else:
        rows = [RandomProjection()(images) for images in sides]
        expected_rows = [features.double().numpy() for features in rows]
    found = nearest(*rows, num_neighbours=9)
    indices, is_mirrored, distances, relative_distances = zip(*brute_force(*expected_rows, 9), strict=True)
    assert found.indices.tolist() == list(indices)
    assert found.is_mirrored.tolist() == list(is_mirrored)
    assert 0 < sum(is_mirrored) < 20
    assert found.distances.tolist() == pytest.approx(distances, rel=1e-9)
    assert found.relative_distances.tolist() == pytest.approx(relative_distances, rel=1e-9)


def test_memory_limit_bounds_the_rows_of_large_images(faces, monkeypatch):
    rows = [images.flatten(start_dim=1) for images in (faces["samples"], faces["train"], faces["train"].flip(-1))]
    expected = nearest(*rows)
    sizes, directions = set(), neighbours._directions
    monkeypatch.setattr(neighbours, "_NUMBERS", 10 * rows[0].shape[1])
    monkeypatch.setattr(neighbours, "_directions", lambda x, centre: sizes.add(len(x)) or directions(x, centre))
    for values, expected_values in zip(nearest(*rows), expected, strict=True):
        torch.testing.assert_close(values, expected_values)
    assert sizes == {10}


def test_copies_are_at_distance_zero(faces):
    train = faces["train"].flatten(start_dim=1)
    found = nearest(train[:40], train, faces["train"].flip(-1).flatten(start_dim=1))
    assert found.indices.tolist() == list(range(40))
    assert not found.is_mirrored.any()
    assert found.distances.max() < 1e-7
    train = torch.randn(200, 64) + 1000  # images so similar that float32 would leave noise
    found = nearest(train[:40], train, torch.randn(200, 64) + 1000)
    assert found.distances.max() < 1e-7
    assert found.indices.tolist() == list(range(40))


def test_relative_distance_of_an_image_that_training_repeats():
    train = torch.cat([torch.ones(60, 4), torch.randn(60, 4)])
    found = nearest(train[:1], train, train)
    assert found.relative_distances.item() < 1e-6
    assert not found.is_mirrored.item()  # at equal distances, the image is not mirrored


def test_brightness_and_contrast_of_images_do_not_matter():
    images = pictures(60) // 4
    found = nearest(*(side.flatten(start_dim=1) for side in (2 * images + 50, images, images.flip(-1))))
    assert found.indices.tolist() == list(range(60))
    assert found.distances.max() < 1e-6


def test_average_faces_are_not_near_the_most_average_training_image():
    """Three training images and the queries are all close to the mean, but in different directions."""
    common = 5 * torch.randn(64)
    deviation = torch.ones(200, 1)
    deviation[:3] = 0.1
    train, mirrored = common + deviation * torch.randn(2, 200, 64)
    assert nearest(common + 0.1 * torch.randn(50, 64), train, mirrored).relative_distances.min() > 0.7


# The audit


CHANGES = {
    "exact": lambda images: images,
    "noisy": noisy,
    "blurred": blurred,
    "mirrored": lambda images: images.flip(-1),
    "mirrored and blurred": lambda images: blurred(images.flip(-1)),
    "brighter": lambda images: to_uint8(1.2 * images),
}


@pytest.mark.parametrize("change", CHANGES)
def test_copies_are_found(faces, change):
    report = audit(**with_copies(faces, CHANGES[change]))
    (space,) = report.spaces
    assert report.found_copies
    assert report.verdict.startswith("Copies found: by pixels 10.")
    assert space.p_value < 0.01
    assert NUM_PLANTED <= round(space.copy_rate * NUM_SAMPLES) <= NUM_PLANTED + 3
    pairs = {pair.index: pair for pair in space.pairs[:NUM_PLANTED]}
    assert sorted(pairs) == list(range(NUM_PLANTED))
    for index, pair in pairs.items():
        assert pair.train_index == 3 * index + 1
        assert pair.is_mirrored == change.startswith("mirrored")
    distances = [pair.relative_distance for pair in space.pairs]
    assert distances == sorted(distances)
    assert distances[NUM_PLANTED - 1] < space.threshold
    limit = space.held_out_pairs[0].relative_distance / 2
    assert space.num_plain_copies == sum(distance < limit for distance in distances)
    assert (space.num_plain_copies == 0) == change.endswith("blurred")


def test_copies_are_found_by_features(mirrored_copies):
    _, report = mirrored_copies
    pixels, network = report.spaces
    assert network.name == "random projection"
    assert network.p_value < 0.005
    assert network.num_plain_copies == pixels.num_plain_copies == NUM_PLANTED
    for pair in network.pairs[:NUM_PLANTED]:
        assert (pair.train_index, pair.is_mirrored) == (3 * pair.index + 1, True)
        assert pair.distance == pytest.approx(0, abs=1e-4)


def test_new_images_are_not_copies(faces):
    report = audit(**faces, extractor=RandomProjection())
    assert not report.found_copies
    assert report.verdict.startswith("No more copies than among held-out real faces: by pixels ")
    for space in report.spaces:
        assert space.num_plain_copies == 0
        assert space.held_out_copy_rate == 0.01
        assert space.held_out_interval == wilson_interval(1, NUM_HELD_OUT)
        assert space.median_relative_distance == pytest.approx(space.held_out_median_relative_distance, abs=0.02)


def test_new_drawn_faces_are_not_copies():
    """Drawn faces resemble each other far more than real faces do."""
    drawn = DrawnFaces(500, resolution=16)
    images = torch.stack([torch.from_numpy(np.array(face["image"])).permute(2, 0, 1) for face in drawn])
    samples, train, held_out = images.split([100, 300, 100])
    assert not audit(samples, train, held_out).found_copies
    assert audit(torch.cat([samples, train[:1]]), train, held_out).found_copies


@pytest.mark.parametrize("num_averaged", [10, 100])
def test_smooth_average_images_are_not_copies(faces, num_averaged):
    orders = [torch.randperm(NUM_TRAIN)[:num_averaged] for _ in range(NUM_SAMPLES)]
    averages = torch.stack([to_uint8(faces["train"][order].float().mean(dim=0)) for order in orders])
    report = audit(averages, faces["train"], faces["held_out"])
    assert not report.found_copies


def test_a_single_exact_copy_is_found_at_a_normal_rate(faces):
    report = audit(**with_copies(faces, number=1))
    (space,) = report.spaces
    assert space.p_value > 0.1
    assert space.num_plain_copies == 1
    assert report.found_copies
    assert "plain copies 1." in report.verdict


class Memory(ModelMixin, ConfigMixin):
    """A network that has memorized its training images: the exact mean of x_0 over them, given x_t."""

    config_name = "config.json"

    @register_to_config
    def __init__(self, sample_size: int = 16, in_channels: int = 3, out_channels: int = 3) -> None:
        super().__init__()
        self.alphas_cumprod = DDPMFacesScheduler().alphas_cumprod
        self.register_buffer("pictures", torch.zeros(1, 3, 16, 16))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, **kwargs) -> UNet2DOutput:
        alpha_bar = self.alphas_cumprod[timestep].expand(len(sample)).view(-1, 1)
        x, known = sample.flatten(1), self.pictures.flatten(1)
        squares = ((x[:, None] - alpha_bar[:, :, None].sqrt() * known) ** 2).sum(dim=2)
        x_0 = torch.softmax(-squares / (2 * (1 - alpha_bar)), dim=1) @ known
        return UNet2DOutput(sample=((x - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()).view_as(sample))


def test_model_that_memorized_its_training_images_is_found(tmp_path):
    faces = [face["image"] for face in DrawnFaces(240, resolution=16)]
    for split, images in {"train": faces[:120], "test": faces[120:]}.items():
        Dataset.from_list([{"image": image} for image in images]).to_parquet(tmp_path / f"{split}.parquet")
    unet = Memory()
    unet.pictures = torch.stack([picture_to_tensor(image, (16, 16)) for image in faces[:120]]) / 127.5 - 1
    pipeline = DDPMFacesPipeline(unet, DDPMFacesScheduler())
    report, results, _ = audit_model(pipeline, str(tmp_path), num_images=100, num_loss_images=100)
    assert report.found_copies
    assert report.spaces[0].num_plain_copies > 90
    assert results["losses"]["held_out"]["loss"] > 2 * results["losses"]["train"]["loss"]
    assert results["verdict"].endswith("on as many training images. The model is memorizing its training images.")


def test_threshold_is_the_second_smallest_of_a_hundred_held_out_values(faces):
    (space,) = audit(**faces).spaces
    assert space.threshold == space.held_out_pairs[1].relative_distance
    rows = [faces[name].flatten(start_dim=1) for name in ("samples", "train")]
    values = nearest(*rows, faces["train"].flip(-1).flatten(start_dim=1)).relative_distances
    assert space.copy_rate == (values < space.threshold).double().mean().item()


def test_significance_level_is_divided_among_the_spaces(faces):
    report = audit(**faces)
    space = replace(report.spaces[0], p_value=0.007, num_plain_copies=0)
    assert replace(report, spaces=[space]).found_copies
    assert not replace(report, spaces=[space, space]).found_copies
    assert replace(report, spaces=[space, replace(space, p_value=0.004)]).found_copies
    assert not replace(report, spaces=[replace(space, p_value=0.011)]).found_copies


def test_report_as_plain_values(mirrored_copies):
    _, report = mirrored_copies
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["verdict"] == report.verdict
    assert plain["found_copies"] is True
    numbers = [plain[name] for name in ("num_samples", "num_train", "num_held_out", "num_neighbours", "image_size")]
    assert numbers == [NUM_SAMPLES, NUM_TRAIN, NUM_HELD_OUT, 50, [HEIGHT, WIDTH]]
    assert (plain["extractor"], plain["resize"]) == ("random projection", "none")
    assert [space["name"] for space in plain["spaces"]] == ["pixels", "random projection"]
    assert len(plain["spaces"][1]["pairs"]) == len(plain["spaces"][1]["held_out_pairs"]) == 32
    assert plain["spaces"][0]["pairs"][0].keys() == {
        *("index", "train_index", "is_mirrored", "distance", "relative_distance")
    }


def test_verdict_quotes_numbers_and_intervals(faces):
    report = audit(**faces)
    space = replace(report.spaces[0], copy_rate=6 / 512, interval=wilson_interval(6, 512), p_value=0.5)
    report = replace(report, spaces=[space], num_samples=512)
    assert report.verdict.startswith(
        "No more copies than among held-out real faces: by pixels 1.2 % (0.5 to 2.5 %) of 512 samples, of 100 "
        "held-out faces 1.0 % (0.2 to 5.4 %), p = 0.5, plain copies 0. A face counts if it is as near to one of 300 "
        "training"
    )


# Statistics


@pytest.mark.parametrize(
    ("count", "total", "expected"),
    # Newcombe 1998, table I, method 3.
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_wilson_interval(count, total, expected):
    assert wilson_interval(count, total) == pytest.approx(expected, abs=5e-5)
    mirrored = tuple(1 - bound for bound in reversed(expected))
    assert wilson_interval(total - count, total) == pytest.approx(mirrored, abs=5e-5)


def test_exceedance_p_value_is_fishers():
    assert exceedance_p_value(3, 4, 1, 4) == pytest.approx(17 / 70)  # the lady tasting tea
    assert exceedance_p_value(0, 400, 4, 400) == 1
    assert 0 <= exceedance_p_value(5000, 5000, 4, 400) < 1e-300


@pytest.mark.parametrize(("num_samples", "num_held_out", "held_out_count"), [(5, 4, 1), (4, 6, 2), (6, 3, 0)])
def test_exceedance_p_value_counts_all_orders(num_samples, num_held_out, held_out_count):
    """The threshold is the held-out value with `held_out_count` held-out values below it, as in the audit."""
    total = num_samples + num_held_out
    counts = []
    for places in itertools.combinations(range(total), num_held_out):
        counts.append(places[held_out_count] - held_out_count)  # the samples below the threshold
    for count in range(num_samples + 1):
        expected = sum(other >= count for other in counts) / len(counts)
        assert exceedance_p_value(count, num_samples, held_out_count, num_held_out) == pytest.approx(expected)


# The image


def test_image_shows_the_closest_pairs(mirrored_copies):
    copied, report = mirrored_copies
    picture = np.asarray(closest_pairs_picture(report, **copied, num_pairs=5))
    scale, gap, title, label = 5, 12, 40, 28  # 20 pixels become 100
    height, width = scale * HEIGHT, scale * WIDTH
    tile = 2 * width + 2

    def enlarged(image: torch.Tensor) -> np.ndarray:
        return image.permute(1, 2, 0).repeat_interleave(scale, 0).repeat_interleave(scale, 1).numpy()

    block = title + 2 * (height + label)
    assert picture.shape == (4 * block, gap + 4 * (tile + gap), 3)
    for space, top in zip(report.spaces, (0, 2 * block), strict=True):
        for faces, pairs, start in (
            (copied["samples"], space.pairs, top),
            (copied["held_out"], space.held_out_pairs, top + block),
        ):
            assert (picture[start : start + title] < 128).any()
            for i, pair in enumerate(pairs[:5]):
                y, x = start + title + i // 4 * (height + label), gap + i % 4 * (tile + gap)
                np.testing.assert_array_equal(picture[y : y + height, x : x + width], enlarged(faces[pair.index]))
                original = copied["train"][pair.train_index]
                original = original.flip(-1) if pair.is_mirrored else original
                right = picture[y : y + height, x + width + 2 : x + tile]
                np.testing.assert_array_equal(right, enlarged(original))
                assert (picture[y + height : y + height + label, x : x + tile] < 128).any()  # a label
            assert (picture[y : y + height, x + tile :] == 255).all()  # no sixth pair
    pairs = [pair for space in report.spaces for pair in space.pairs[:5] + space.held_out_pairs[:5]]
    assert {pair.is_mirrored for pair in pairs} == {True, False}


def test_image_of_one_pair_has_room_for_its_title(faces):
    report = audit(**faces)
    few, many = (closest_pairs_picture(report, **faces, num_pairs=number) for number in (1, 32))
    assert few.width > 300
    assert many.height > 4 * few.height
    assert (np.asarray(few)[:, -12:] == 255).all()


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": pictures(99)}, "`samples` must contain at least 100 images, got 99"),
        ({"held_out": pictures(99)}, "`held_out` must contain at least 100 images, got 99"),
        ({"samples": pictures(100).float()}, r"`samples` must be of type uint8 .* got torch.float32 and \(100, 3, 20"),
        (
            {"train": pictures(100)[:, :1]},
            r"`train` must be .* shape \(num, 3, height, width\), .* \(100, 1, 20, 24\)",
        ),
        ({"held_out": pictures(100)[0]}, r"`held_out` must be .* got torch.uint8 and \(3, 20, 24\)"),
        ({"held_out": [1, 2]}, "`held_out` must be a tensor of images, got list"),
        (
            {"train": pictures(100)[..., :20]},
            r"`train` and `samples` must have the same size, got .* \(20, 20\) and \(20,",
        ),
        (
            {"held_out": pictures(100)[:, :, 1:]},
            r"`held_out` and `samples` must have the same size, got .* \(19, 24\)",
        ),
        ({"train": pictures(50)}, "`num_neighbours` must be an integer from 2 to 49, got 50"),
        ({"num_neighbours": 300}, "`num_neighbours` must be an integer from 2 to 299, got 300"),
        ({"num_neighbours": 1}, "`num_neighbours` must be an integer from 2 to 299, got 1"),
        ({"num_neighbours": True}, "`num_neighbours` must be an integer from 2 to 299, got True"),
        ({"num_neighbours": 5.0}, "`num_neighbours` must be an integer from 2 to 299, got 5.0"),
    ],
)
def test_bad_input_is_refused_before_any_work(faces, monkeypatch, changes, message):
    monkeypatch.setattr(copies, "nearest", None)
    with pytest.raises(ValueError, match=message):
        audit(**{**faces, **changes})


def test_held_out_faces_must_not_be_training_images(faces):
    held_out = faces["held_out"].clone()
    held_out[:1] = faces["train"][:1]
    assert audit(**{**faces, "held_out": held_out}).spaces[0].held_out_pairs[0].relative_distance < 1e-7
    held_out[:2] = faces["train"][:2].flip(-1)
    with pytest.raises(
        ValueError, match="`held_out` must not contain training images, but more than 1 % of it is in `train`"
    ):
        audit(**{**faces, "held_out": held_out})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((torch.zeros(3, 4), torch.zeros(9, 5), torch.zeros(9, 5)), r"`queries` must be .* got \(3, 4\)"),
        ((torch.zeros(3, 5), torch.zeros(9, 5), torch.zeros(8, 5)), r"`mirrored_train` must be .* got \(8, 5\)"),
        ((torch.zeros(3, 5), torch.zeros(9), torch.zeros(9)), r"`train` must be .* got \(9,\)"),
        ((torch.zeros(3, 5).double(), torch.zeros(9, 5), torch.zeros(9, 5)), "`queries` must be .* torch.float64"),
        ((torch.full((3, 5), math.nan), torch.zeros(9, 5), torch.zeros(9, 5)), "`queries` must be .* NaN"),
        (
            (torch.zeros(3, 5).int(), torch.zeros(9, 5).int(), torch.zeros(9, 5).int()),
            "`train` must be .* torch.int32",
        ),
        ((torch.zeros(3, 5), torch.zeros(4, 5), torch.zeros(4, 5)), "`num_neighbours` must be .* from 2 to 3, got 4"),
    ],
)
def test_search_refuses_bad_rows(rows, message):
    with pytest.raises(ValueError, match=message):
        nearest(*rows, num_neighbours=4)


def test_image_refuses_bad_input(faces):
    report = audit(**faces)
    for num_pairs in (0, 33, True, 2.0):
        with pytest.raises(ValueError, match=f"`num_pairs` must be an integer from 1 to 32, got {num_pairs}"):
            closest_pairs_picture(report, **faces, num_pairs=num_pairs)
    for name in faces:
        with pytest.raises(ValueError, match=f"`{name}` must be the images of `report`, of shape .*, got "):
            closest_pairs_picture(report, **{**faces, name: faces[name][1:]})
    with pytest.raises(ValueError, match="`samples` must be of type uint8"):
        closest_pairs_picture(report, **{**faces, "samples": faces["samples"].float()})
