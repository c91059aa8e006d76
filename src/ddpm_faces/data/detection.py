"""Face detection by MTCNN (Zhang et al. 2016, https://arxiv.org/abs/1604.02878)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..weights import check_images, load_weights, package_folder


_MIN_FACE, _SHRINK, _CELL, _STRIDE = 20, 0.709, 12, 2
_THRESHOLDS = (0.6, 0.7, 0.7)
# Pooling (kernel, stride) after each convolution of the three networks.
_POOLS = {"pnet": [(2, 2), None, None], "rnet": [(3, 2), (3, 2), None], "onet": [(3, 2), (3, 2), (2, 2), None]}
# The first digits of the SHA-256 of each file of weights in facenet-pytorch 2.6.0.
_SHA256 = {"pnet": "a2a71925e0b9996a", "rnet": "bbb937de72efc9ef", "onet": "165bfbe42940416c"}

State = dict[str, torch.Tensor]


class DetectedFace(NamedTuple):
    """A face in an image, in pixels from its upper left corner.

    Args:
        score (`float`): Probability that it is a face.
        box (`tuple[float, float, float, float]`): Left, top, right and bottom edge.
        landmarks (`torch.Tensor` of shape `(5, 2)`):
            x and y of the left eye, the right eye, the nose and the left and right corner of the mouth, as seen in the
            image.
    """

    score: float
    box: tuple[float, float, float, float]
    landmarks: torch.Tensor

    def is_near(self, other: "DetectedFace") -> bool:
        """Whether the center of the box is within that of `other`, so that both are the same face."""
        x, y = (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2
        return other.box[0] < x < other.box[2] and other.box[1] < y < other.box[3]


class MTCNN:
    """Finds faces of at least 20 pixels with three small networks; each filters the candidates of the previous one.

    The weights are those of the package facenet-pytorch (MIT). It requires old versions of its dependencies, so
    install it with `pip install --no-deps facenet-pytorch`; none of its code is run. Thresholds (0.6, 0.7, 0.7) and
    scales (0.709) are its defaults.

    Args:
        device (`str` or `torch.device`, defaults to `"cpu"`): Device to compute on.

    Raises:
        ImportError: The package is not installed.
        ValueError: A file of its weights is damaged.
    """

    name = "MTCNN (facenet-pytorch), faces of 20 pixels, thresholds 0.6, 0.7, 0.7"

    def __init__(self, device: str | torch.device = "cpu") -> None:
        folder = package_folder("facenet_pytorch") / "data"
        self.device = device
        self.states = {}
        for name in _POOLS:
            state = load_weights(folder / f"{name}.pt", "facenet-pytorch", _SHA256[name])
            self.states[name] = {key: tensor.to(device) for key, tensor in state.items()}

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return the probability of the likeliest face in each image, 0 if none is found.

        Args:
            images (`torch.Tensor` of shape `(batch, 3, height, width)`, `torch.uint8`): Images, 0 to 255.

        Returns:
            `torch.Tensor` of shape `(batch,)`, `torch.float32`, on the CPU.

        Raises:
            ValueError: The images have a wrong type or shape.
        """
        owners, _, scores, _ = self._detect(images)
        best = torch.zeros(len(images), device=self.device)
        return best.scatter_reduce(0, owners, scores, "amax").cpu()

    @torch.no_grad()
    def find(self, image: torch.Tensor) -> list[DetectedFace]:
        """Find the faces in an image.

        Args:
            image (`torch.Tensor` of shape `(3, height, width)`, `torch.uint8`): An image, 0 to 255.

        Returns:
            `list[DetectedFace]`: The faces of at least 20 pixels, the largest first.

        Raises:
            ValueError: The image has a wrong type or shape.
        """
        _, boxes, scores, landmarks = (values.cpu() for values in self._detect(image[None]))
        rows = zip(scores.tolist(), map(tuple, boxes.tolist()), landmarks, strict=True)
        faces: list[DetectedFace] = []
        for face in sorted((DetectedFace(*row) for row in rows), key=lambda face: -face.score):
            if not any(face.is_near(other) for other in faces):
                faces.append(face)
        return sorted(faces, key=lambda face: face.box[0] - face.box[2])

    def _detect(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return owners (n,), boxes (n, 4), scores (n,) and landmarks (n, 5, 2) of the faces in all images."""
        check_images(images)
        pixels = images.to(self.device).float()
        owners, boxes = self._propose(pixels)
        owners, boxes, *_ = self._refine("rnet", pixels, owners, boxes, 24, _THRESHOLDS[1])
        return self._refine("onet", pixels, owners, boxes, 48, _THRESHOLDS[2])

    def _propose(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Slide the first network over the images at all scales. Return candidates: owners (n,), boxes (n, 4)."""
        height, width = pixels.shape[2:]
        none = torch.zeros(0, 4, device=pixels.device)
        scale = _CELL / _MIN_FACE
        found: list[tuple[torch.Tensor, ...]] = [(none[:, 0].long(), none, none[:, 0], none)]
        while min(height, width) * scale >= _CELL:
            small = _resize(pixels, (int(height * scale + 1), int(width * scale + 1)))
            features = _features(self.states["pnet"], "pnet", small)
            scores = _conv(self.states["pnet"], "conv4_1", features).softmax(dim=1)[:, 1]
            shifts = _conv(self.states["pnet"], "conv4_2", features)
            owner, row, column = (scores >= _THRESHOLDS[0]).nonzero(as_tuple=True)
            corner = torch.stack([column, row], dim=1) * _STRIDE
            boxes = torch.cat([(corner + 1) / scale, (corner + _CELL) / scale], dim=1).floor()
            kept = _suppress(owner, boxes, scores[owner, row, column], 0.5)
            rows = (owner, boxes, scores[owner, row, column], shifts[owner, :, row, column])
            found.append(tuple(values[kept] for values in rows))
            scale *= _SHRINK
        owners, boxes, scores, shifts = (torch.cat(values) for values in zip(*found, strict=True))
        kept = _suppress(owners, boxes, scores, 0.7)
        owners, boxes, shifts = owners[kept], boxes[kept], shifts[kept]
        sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        return owners, _square(boxes + shifts * sides)

    def _refine(
        self, name: str, pixels: torch.Tensor, owners: torch.Tensor, boxes: torch.Tensor, side: int, threshold: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run a network on the content of the boxes. Return owners, corrected boxes, scores, landmarks of faces."""
        crops, nonempty, places = [], [], []
        height, width = pixels.shape[2:]
        for index, (owner, box) in enumerate(zip(owners.tolist(), boxes.trunc().int().tolist(), strict=True)):
            left, top, right, bottom = max(box[0], 1) - 1, max(box[1], 1) - 1, min(box[2], width), min(box[3], height)
            if right > left and bottom > top:
                crops.append(_resize(pixels[owner : owner + 1, :, top:bottom, left:right], (side, side)))
                nonempty.append(index)
                places.append((left, top, right - left, bottom - top))
        if not crops:
            return owners[:0], boxes[:0], boxes[:0, 0], boxes.new_zeros(0, 5, 2)
        owners, boxes = owners[nonempty], boxes[nonempty]
        state, last = self.states[name], {"rnet": 5, "onet": 6}[name]
        features = _features(state, name, torch.cat(crops)).permute(0, 3, 2, 1).flatten(start_dim=1)
        features = F.prelu(_linear(state, f"dense{last - 1}", features), state[f"prelu{last - 1}.weight"])
        scores = _linear(state, f"dense{last}_1", features).softmax(dim=1)[:, 1]
        shifts = _linear(state, f"dense{last}_2", features)
        landmarks = boxes.new_zeros(len(boxes), 5, 2)
        if name == "onet":  # the network tells five x, then five y, as parts of its input
            place = torch.tensor(places, dtype=boxes.dtype, device=boxes.device)
            parts = _linear(state, "dense6_3", features).view(-1, 2, 5).transpose(1, 2)
            landmarks = place[:, None, :2] + parts * place[:, None, 2:]
        passed = scores > threshold
        owners, boxes, scores, shifts, landmarks = (
            values[passed] for values in (owners, boxes, scores, shifts, landmarks)
        )
        sides = (boxes[:, 2:] - boxes[:, :2] + 1).repeat(1, 2)
        kept = _suppress(owners, boxes, scores, 0.7)
        boxes = boxes + shifts * sides
        return owners[kept], _square(boxes[kept]), scores[kept], landmarks[kept]


def _conv(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _linear(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _features(state: State, name: str, pixels: torch.Tensor) -> torch.Tensor:
    x = (pixels - 127.5) / 128
    for i, pool in enumerate(_POOLS[name], start=1):
        x = F.prelu(_conv(state, f"conv{i}", x), state[f"prelu{i}.weight"])
        x = x if pool is None else F.max_pool2d(x, *pool, ceil_mode=True)
    return x


def _resize(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(pixels, size=size, mode="area")


def _square(boxes: torch.Tensor) -> torch.Tensor:
    """Return square boxes with the same centers."""
    sides = boxes[:, 2:] - boxes[:, :2]
    side = sides.amax(dim=1, keepdim=True)
    corner = boxes[:, :2] + sides / 2 - side / 2
    return torch.cat([corner, corner + side], dim=1)


def _suppress(owners: torch.Tensor, boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return the indices of boxes that overlap no likelier box of the same image by more than `threshold` (IoU)."""
    order = scores.argsort(descending=True)
    owners, boxes = owners[order], boxes[order]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    alive = torch.ones(len(order), dtype=torch.bool, device=boxes.device)
    for i in range(len(order)):
        if not alive[i]:
            continue
        low = torch.maximum(boxes[i, :2], boxes[i + 1 :, :2])
        high = torch.minimum(boxes[i, 2:], boxes[i + 1 :, 2:])
        overlap = (high - low).clamp(min=0).prod(dim=1)
        ratio = overlap / (areas[i] + areas[i + 1 :] - overlap)
        alive[i + 1 :] &= (owners[i + 1 :] != owners[i]) | (ratio <= threshold)
    return order[alive]
