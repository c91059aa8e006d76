"""Measure how exactly faces are found and aligned.

    python benchmarks/alignment.py my-aligned-faces

Each aligned face is pasted into a larger photo, turned by up to 20 degrees and enlarged up to twice. The frame that is
found there is compared with the true one. The error is the mean distance of their points, in pixels of a crop of 64.
"""

import argparse
import math

import numpy as np
from PIL import Image

from ddpm_faces.data import load_faces
from ddpm_faces.data.alignment import Frame, find_frames
from ddpm_faces.data.detection import MTCNN


SIZE = 64
QUANTILES = (0.5, 0.9, 0.99, 1.0)


def hide(face: np.ndarray, rng: np.random.Generator) -> tuple[Image.Image, Frame]:
    """Paste a face into a photo. Return the photo and the frame of the face."""
    side, angle = face.shape[0] * rng.uniform(1, 2), math.radians(rng.uniform(-20, 20))
    edge = side * math.cos(angle), side * math.sin(angle)
    photo = np.full((4 * face.shape[0], 4 * face.shape[0], 3), 128, np.uint8)
    middle = photo.shape[0] / 2 + rng.uniform(-20, 20)
    frame = Frame((middle - (edge[0] - edge[1]) / 2, middle - (edge[0] + edge[1]) / 2), edge)
    place, values = frame.spread(face.astype(np.float32), photo.shape[:2])
    photo[place] = values.clip(0, 255).round()
    return Image.fromarray(photo), frame


def points(frame: Frame) -> np.ndarray:
    """Return points on a grid in the frame, of shape `(n, 2)`."""
    across, down = np.meshgrid(np.linspace(0, 1, 9), np.linspace(0, 1, 9))
    (x, y), (dx, dy) = frame.corner, frame.edge
    return np.stack([x + across * dx - down * dy, y + across * dy + down * dx], axis=-1).reshape(-1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="dataset of faces, aligned as in FFHQ")
    parser.add_argument("--split", default="test")
    parser.add_argument("--size", type=int, default=128, help="size of the images (default: 128)")
    parser.add_argument("--num-images", type=int, default=200)
    arguments = parser.parse_args()

    size = (arguments.size, arguments.size)
    faces = load_faces(arguments.data, resolution=size, split=arguments.split, max_images=arguments.num_images)
    detector, rng = MTCNN(), np.random.default_rng(0)
    errors = []
    for face in faces.images:
        photo, frame = hide(face.permute(1, 2, 0).numpy(), rng)
        distances = [
            np.linalg.norm(points(found) - points(frame), axis=1).mean() / frame.side * SIZE
            for found in find_frames(photo, detector)
        ]
        errors.append(min(distances, default=math.inf))
    is_found = np.array(errors) < SIZE / 4
    quantiles = np.quantile(np.array(errors)[is_found], QUANTILES)
    shown = ", ".join(f"{share:.0%} {value:.2f}" for share, value in zip(QUANTILES, quantiles, strict=True))
    print(f"{is_found.sum()} of {len(errors)} faces are found. Quantiles of the error in pixels: {shown}")


if __name__ == "__main__":
    main()
