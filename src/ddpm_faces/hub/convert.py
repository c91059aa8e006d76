"""Convert checkpoints of the article's own code, `torch.save(model.state_dict(), path)`, into pipelines."""

import os
import re
from collections import OrderedDict
from pathlib import Path

import torch

from ..pipeline_ddpm_faces import DDPMFacesPipeline
from ..scheduling_ddpm_faces import DDPMFacesScheduler
from ..unet_ddpm_faces import DDPMFacesUNet


Module = dict[str, torch.Tensor]
_ARTICLE = (
    "the article's network (a 3x3 convolution in, a linear layer for the timestep, blocks of two 3x3 convolutions, "
    "one of 4x4, two BatchNorms and a linear layer, a 1x1 convolution out)"
)


def convert_checkpoint(path: str | os.PathLike, sample_size: int | tuple[int, int] = 64) -> DDPMFacesPipeline:
    """Convert a state dict of the article's U-Net. The names of its modules do not matter.

    The role of a layer follows from its shape and from its neighbors. Only the two norms of a block have the same
    shape; the numbers in their names determine their order.

    Args:
        path (`str` or `os.PathLike`): File written by `torch.save`. Only tensors are read from it.
        sample_size (`int` or `(int, int)`, defaults to 64): Height and width of the training images.

    Returns:
        [`DDPMFacesPipeline`]: The pipeline, with the article's schedule: T = 300, linear betas, posterior variance, no
        clipping.

    Raises:
        ValueError: The file is not such a checkpoint. The message explains why.
    """
    blocks, time_layer, conv_in, conv_out = _article_parts(_read(path), str(path))
    downs = sorted((b for b in blocks if b["conv1"]["weight"].shape[1] < b["width"]), key=lambda b: b["width"])
    ups = sorted((b for b in blocks if b["conv1"]["weight"].shape[1] > b["width"]), key=lambda b: -b["width"])
    widths = [conv_in["weight"].shape[0], *(block["width"] for block in downs)]
    multiple = 2 ** len(downs)
    sides = sample_size if isinstance(sample_size, tuple) else (sample_size,)
    if not all(isinstance(side, int) and side > 0 and side % multiple == 0 for side in sides):
        raise ValueError(
            f"`sample_size` must be a side or (height, width), each a multiple of {multiple} for this network of "
            f"{len(downs)} levels, got {sample_size!r}."
        )
    try:
        unet = DDPMFacesUNet(
            sample_size=sample_size,
            in_channels=conv_in["weight"].shape[1],
            out_channels=conv_out["weight"].shape[0],
            block_out_channels=tuple(widths),
            block_types=("conv",) * len(downs),
            time_proj_dim=time_layer["weight"].shape[1],
            time_embedding_dim=time_layer["weight"].shape[0],
        ).eval()
        state: OrderedDict[str, torch.Tensor] = OrderedDict()
        for name, module in (("time_embedding.0", time_layer), ("conv_in", conv_in), ("conv_out", conv_out)):
            state |= {f"{name}.{key}": value for key, value in module.items()}
        for kind, group in (("down_blocks", downs), ("up_blocks", ups)):
            for i, block in enumerate(group):
                for part in ("conv1", "norm1", "time_emb_proj", "conv2", "norm2", "resample"):
                    state |= {f"{kind}.{i}.block.{part}.{key}": value for key, value in block[part].items()}
        unet.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is not {_ARTICLE}: {' '.join(str(error).split())}") from error
    return DDPMFacesPipeline(unet, DDPMFacesScheduler(clip_sample=False))


def _read(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    if not Path(path).is_file():
        raise ValueError(f"The checkpoint must be a file, got {str(path)!r}.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds of errors on other files
        # The message of torch suggests reading the file unsafely.
        raise ValueError(
            f"{path} must be a file written by torch.save(model.state_dict(), ...), and contain only tensors: other "
            "objects could run code, and are not read."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and _is_plain(v) for k, v in state.items()):
        kind = type(state).__name__
        held = f" of {', '.join(map(str, list(state)[:5]))}" if isinstance(state, dict) else ""
        raise ValueError(f"{path} must contain a state dict of names and tensors, got a {kind}{held}.")
    if not state:
        raise ValueError(f"{path} contains an empty state dict.")
    bad = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise ValueError(f"{path} contains weights that are not finite: {', '.join(bad[:5])}.")
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def _is_plain(value: object) -> bool:
    """Whether a value is a tensor with storage for all its numbers. A crafted file may lack it."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    return not value.is_complex() and value.untyped_storage().nbytes() >= value.numel() * value.element_size()


def _article_parts(state: dict[str, torch.Tensor], path: str) -> tuple[list[dict], Module, Module, Module]:
    """Return the blocks with their layers by role, the timestep's linear layer, and the first and last layers."""
    modules: dict[str, Module] = {}
    for name, tensor in state.items():
        owner, _, parameter = name.rpartition(".")
        modules.setdefault(owner, {})[parameter] = tensor
    kinds = {name: kind for name, module in modules.items() if (kind := _kind(module)) is not None}
    strange = [name for name in modules if name not in kinds]
    if strange:
        raise ValueError(f"{path} is not {_ARTICLE}: it has {', '.join(strange[:5])}.")

    # A block is a prefix of names that contains exactly the layers of a block.
    wanted = ["3x3", "3x3", "4x4", "linear", "norm", "norm"]
    places = {name.rsplit(".", depth)[0] for name in modules for depth in range(1, name.count(".") + 1)}
    inside = {place: [name for name in modules if name.startswith(place + ".")] for place in places}
    blocks = [names for _, names in sorted(inside.items()) if sorted(kinds[name] for name in names) == wanted]
    used = {name for names in blocks for name in names}
    rest = {kinds[name]: modules[name] for name in modules if name not in used}
    left = sorted(kinds[name] for name in modules if name not in used)
    if len(blocks) < 2 or len(blocks) % 2 or left != ["1x1", "3x3", "linear"]:
        others = ", ".join(left) or "nothing"
        raise ValueError(f"{path} is not {_ARTICLE}: it has {len(blocks)} such blocks and, beside them, {others}.")
    parts = [_block({name: modules[name] for name in names}, kinds) for names in blocks]
    return parts, rest["linear"], rest["3x3"], rest["1x1"]


def _kind(module: Module) -> str | None:
    if "running_mean" in module:
        return "norm"
    weight = module.get("weight")
    if weight is None or "bias" not in module:
        return None
    if weight.ndim == 2:
        return "linear"
    return "x".join(map(str, weight.shape[2:])) if weight.ndim == 4 else None


def _block(modules: dict[str, Module], kinds: dict[str, str]) -> dict:
    by_kind: dict[str, list[Module]] = {}
    # The two norms have the same shape. The numbers in their names determine their order, not the order in the file.
    for name, module in sorted(modules.items(), key=lambda item: [int(n) for n in re.findall(r"\d+", item[0])]):
        by_kind.setdefault(kinds[name], []).append(module)
    # The first convolution changes the width, the second does not.
    convs = sorted(by_kind["3x3"], key=lambda module: module["weight"].shape[0] == module["weight"].shape[1])
    return {
        "width": convs[1]["weight"].shape[0],
        "conv1": convs[0],
        "norm1": by_kind["norm"][0],
        "time_emb_proj": by_kind["linear"][0],
        "conv2": convs[1],
        "norm2": by_kind["norm"][1],
        "resample": by_kind["4x4"][0],
    }
