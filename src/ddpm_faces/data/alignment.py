"""Faces in photos: find them, cut them out in the frame of FFHQ, and put them back.

The frame is the square that FFHQ (Karras et al. 2019, https://arxiv.org/abs/1812.04948, appendix A) cuts out, upright
with respect to the face. Coordinates are in pixels from the upper left corner of the photo.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from .detection import MTCNN, DetectedFace
from .folders import shorten
from .images import MAX_IMAGE_PIXELS, open_image, upright
from .sources import Source


DETECTION_SIDE = 1280  # longer photos are reduced before the search; their faces are at least 1/64 of this
MIN_SCORE = 0.9  # of what counts as a face
_CROP_SIDE = 128  # of the part of the photo in which the landmarks are determined
_MIRRORED = (1, 0, 2, 4, 3)  # the landmarks in a mirrored image


@dataclass(frozen=True)
class Frame:
    """The square of an aligned face in a photo.

    Args:
        corner (`tuple[float, float]`): Its upper left corner, x and y; it may lie outside the photo.
        edge (`tuple[float, float]`): Its upper edge, from left to right.
        score (`float`, defaults to 1.0): Probability that it contains a face.
    """

    corner: tuple[float, float]
    edge: tuple[float, float]
    score: float = 1.0

    @property
    def side(self) -> float:
        """Length of its sides in pixels."""
        return math.hypot(*self.edge)

    @property
    def center(self) -> tuple[float, float]:
        """Its center, x and y."""
        (x, y), (dx, dy) = self.corner, self.edge
        return x + (dx - dy) / 2, y + (dx + dy) / 2

    def scaled(self, factor: float) -> "Frame":
        """Return the frame in a photo that is larger by a factor."""
        return Frame(
            (self.corner[0] * factor, self.corner[1] * factor),
            (self.edge[0] * factor, self.edge[1] * factor),
            self.score,
        )

    @classmethod
    def from_landmarks(cls, landmarks: torch.Tensor, score: float = 1.0) -> "Frame":
        """Return the frame around five landmarks, as FFHQ determines it.

        Args:
            landmarks (`torch.Tensor` of shape `(5, 2)`): As in [`DetectedFace`].
            score (`float`, defaults to 1.0): Probability that it is a face.
        """
        left, right, _, *mouth = landmarks.double().numpy()
        eyes, between_eyes = (left + right) / 2, right - left
        to_mouth = (mouth[0] + mouth[1]) / 2 - eyes
        direction = between_eyes - np.array([-to_mouth[1], to_mouth[0]])
        length = max(2.0 * np.hypot(*between_eyes), 1.8 * np.hypot(*to_mouth))  # half the side
        half = direction / np.hypot(*direction) * length
        down = np.array([-half[1], half[0]])
        corner = eyes + 0.1 * to_mouth - half - down
        return cls(tuple(corner.tolist()), tuple((2 * half).tolist()), score)

    def cut(self, photo: Image.Image, size: int) -> Image.Image:
        """Cut the face out of a photo.

        What lies outside the photo is mirrored at its border.

        Args:
            photo (`PIL.Image.Image`): A photo, of mode "L" or "RGB".
            size (`int`): Side of the result in pixels.
        """
        pixels, (left, top) = _with_border(np.asarray(photo), self)
        # A transformation does not average the pixels that it skips, so it is made in full resolution.
        side = size * min(16, max(1, math.ceil(self.side / size)))
        dx, dy = self.edge[0] / side, self.edge[1] / side
        matrix = (dx, -dy, self.corner[0] + left, dy, dx, self.corner[1] + top)
        face = Image.fromarray(pixels).transform(
            (side, side), Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC
        )
        return face if side == size else face.resize((size, size), Image.Resampling.BOX)

    def spread(self, values: np.ndarray, photo_size: tuple[int, int]) -> tuple[tuple[slice, slice], np.ndarray]:
        """Transform values in the frame to the pixels of the photo.

        Args:
            values (`numpy.ndarray` of shape `(height, width)` or `(height, width, channels)`): Values in the frame.
            photo_size (`tuple[int, int]`): Width and height of the photo.

        Returns:
            `tuple[tuple[slice, slice], numpy.ndarray]`:
                The rows and columns of the photo that the frame touches, and the values there, `numpy.float32`;
                outside the frame, the values at its edges go on.
        """
        (x, y), (dx, dy) = self.corner, self.edge
        corners = [(x, y), (x + dx, y + dy), (x - dy, y + dx), (x + dx - dy, y + dy + dx)]
        low, high = np.min(corners, axis=0), np.max(corners, axis=0)
        left, top = (max(0, math.floor(edge)) for edge in low)
        right, bottom = (min(limit, math.ceil(edge)) for edge, limit in zip(high, photo_size, strict=True))
        size = max(0, right - left), max(0, bottom - top)
        # From a pixel of the photo to the frame: the inverse of a rotation is its transpose.
        margin = max(4, len(values) // 8)
        scale = len(values) / self.side**2
        a, b = dx * scale, dy * scale
        matrix = (a, b, (left - x) * a + (top - y) * b + margin, -b, a, (top - y) * a - (left - x) * b + margin)
        channels = values[..., None] if values.ndim == 2 else values
        planes = []
        for plane in np.moveaxis(channels.astype(np.float32), -1, 0):
            padded = Image.fromarray(np.pad(plane, margin, mode="edge"))
            planes.append(
                np.asarray(padded.transform(size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC))
            )
        result = np.stack(planes, axis=-1)
        return (slice(top, top + size[1]), slice(left, left + size[0])), result[..., 0] if values.ndim == 2 else result


def find_frames(photo: Image.Image, detector: MTCNN) -> list[Frame]:
    """Find the faces of a photo.

    Args:
        photo (`PIL.Image.Image`): A photo, upright and of mode "RGB".
        detector ([`MTCNN`]): Detector.

    Returns:
        `list[Frame]`: Their frames, the largest first.
    """
    scale = min(1.0, DETECTION_SIDE / max(photo.size))
    small = photo if scale == 1 else photo.resize([max(1, round(side * scale)) for side in photo.size])
    frames = [_refined(face, small, detector) for face in detector.find(_to_tensor(small))]
    return sorted((frame.scaled(photo.width / small.width) for frame in frames), key=lambda frame: -frame.side)


class FaceAligner:
    """Finds the faces in a collection of photos, for [`load_faces`].

    Args:
        detector ([`MTCNN`], *optional*): By default loaded on the CPU.

    Attributes:
        num_photos (`int`): Number of photos that were searched.
        num_faces (`int`): Number of faces that were found in them, without those that were skipped.
        skipped (`list[str]`): What was skipped, and why: photos without a face and faces that are too small.

    Raises:
        ImportError: The face detector is not installed.
    """

    def __init__(self, detector: MTCNN | None = None) -> None:
        self.detector = detector or MTCNN()
        self.num_photos = self.num_faces = 0
        self.skipped: list[str] = []

    def __call__(
        self, source: Source, size: tuple[int, int], max_photos: int | None = None, max_pixels: int = MAX_IMAGE_PIXELS
    ) -> Source:
        """Return the faces of the photos as a source, in the order of the photos, the largest of a photo first.

        Args:
            source ([`Source`]): The photos.
            size (`(int, int)`): Height and width of the faces; they must be the same.
            max_photos (`int`, *optional*): Number of photos to search, from the first.
            max_pixels (`int`, *optional*): Upper limit of the pixels of a photo.

        Raises:
            ValueError: The size is not square, or there is no face in all photos.
        """
        height, width = size
        if height != width:
            raise ValueError(f"`resolution` of aligned faces must be square, got {height}x{width}.")
        faces: list[tuple[int, Frame]] = []
        self.num_photos, self.skipped = min(source.num_images, max_photos or source.num_images), []
        for index in tqdm(range(self.num_photos), desc="Finding faces", unit="img"):
            name, value = source.read(index)
            try:
                photo = upright(open_image(value, max_pixels))
            except MemoryError:
                raise
            except Exception as error:  # PIL raises many kinds of errors on damaged images
                self.skipped.append(f"{name}: {error or type(error).__name__}")
                continue
            likely = [frame for frame in find_frames(photo, self.detector) if frame.score >= MIN_SCORE]
            if not likely:
                self.skipped.append(f"{name}: no face")
            for frame in likely:
                if frame.side < width:
                    self.skipped.append(f"{name}: a face of {frame.side:.0f} pixels, which is less than {width}")
                else:
                    faces.append((index, frame))
        self.num_faces = len(faces)
        if not faces:
            raise ValueError(f"No face of {width} pixels or more was found:\n{shorten(self.skipped)}")

        def read(i: int) -> tuple[str, Image.Image]:
            index, frame = faces[i]
            name, value = source.read(index)
            return name, frame.cut(upright(open_image(value, max_pixels)), width)

        def of_faces(values: Callable[[], list] | None) -> Callable[[], list] | None:
            if values is None:
                return None

            def of_each() -> list:
                of_photos = values()
                return [of_photos[index] for index, _ in faces]

            return of_each

        identity = ["aligned", source.identity, [(index, *frame.corner, *frame.edge) for index, frame in faces]]
        labels, captions = of_faces(source.labels), of_faces(source.captions)
        return Source(identity, len(faces), read, labels, source.class_names, captions)


def _refined(face: DetectedFace, photo: Image.Image, detector: MTCNN) -> Frame:
    """Determine the landmarks again, close up and mirrored: their mean is more exact."""
    left, top, right, bottom = face.box
    center, side = np.array([(left + right) / 2, (top + bottom) / 2]), 2 * (right - left)
    around = Frame(tuple((center - side / 2).tolist()), (side, 0.0))
    crop = _to_tensor(around.cut(photo, _CROP_SIDE))
    found = []
    for pixels, order in ((crop, (0, 1, 2, 3, 4)), (crop.flip(-1), _MIRRORED)):
        for other in detector.find(pixels)[:1]:
            points = other.landmarks.clone()
            if order == _MIRRORED:
                points[:, 0] = _CROP_SIDE - points[:, 0]
            points = points[list(order)] * (side / _CROP_SIDE) + torch.from_numpy(center - side / 2)
            if (points - face.landmarks).norm(dim=1).max() < (right - left) / 4:  # not another face beside it
                found.append(points)
    landmarks = torch.stack(found).mean(dim=0) if found else face.landmarks
    return Frame.from_landmarks(landmarks, face.score)


def _to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _with_border(pixels: np.ndarray, frame: Frame) -> tuple[np.ndarray, tuple[int, int]]:
    """Mirror a photo as far as a frame extends beyond it. Return it, and the widths on the left and at the top."""
    x, y = frame.center
    reach = frame.side * math.sqrt(0.5) + 2
    height, width = pixels.shape[:2]
    before = max(0, math.ceil(reach - x)), max(0, math.ceil(reach - y))
    after = max(0, math.ceil(x + reach - width)), max(0, math.ceil(y + reach - height))
    if not any((*before, *after)):
        return pixels, (0, 0)
    widths = [(before[1], after[1]), (before[0], after[0]), *[(0, 0)] * (pixels.ndim - 2)]
    return np.pad(pixels, widths, mode="symmetric"), before
