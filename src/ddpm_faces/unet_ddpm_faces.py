# Copyright 2026 The ddpm-faces authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The network that predicts the noise in an image: a U-Net with configurable types of blocks.

A *level* has a width and a resolution: level i has `block_out_channels[i]` channels at 1 / 2**i of the sample's size,
counted in patches of `patch_size` pixels. A pair of blocks of the type `block_types[i]` connects two levels: the down
block goes from level i to level i + 1 and outputs skip connections, and the up block goes back and uses them. The mid
block works at the last level.

    sample -> conv_in -> down 0 -> down 1 -> ... -> mid -> ... -> up 1 -> up 0 -> conv_out
                            |         `------------ skips -----------'      |
                            `---------------------- skips ------------------'

To add a type of block, write a pair of classes and add a line to `_BLOCKS`.
"""

import inspect
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn
from torch.utils.checkpoint import checkpoint


# Smallest and largest integers in a configuration. Real networks are far from these limits. Untrusted files that
# exceed them are refused before they cost memory or time.
BOUNDS = {
    "in_channels": (1, 1024),
    "out_channels": (1, 1024),
    "patch_size": (1, 64),
    "layers_per_block": (1, 64),
    "time_proj_dim": (4, 16384),
    "time_embedding_dim": (1, 16384),
    "time_embedding_layers": (1, 16),
    "norm_num_groups": (1, 16384),
    "attention_head_dim": (1, 16384),
    "num_class_embeds": (1, 1_000_000),
    "augment_dim": (1, 16384),
    "text_embed_dim": (1, 16384),
}
OPTIONAL = ("num_class_embeds", "augment_dim", "text_embed_dim")
MAX_LEVELS, MAX_WIDTH, MAX_SIDE = 12, 16384, 8192


@dataclass
class DDPMFacesUNetOutput(BaseOutput):
    """Output of `DDPMFacesUNet.forward`, in the form of diffusers' `UNet2DOutput`.

    Args:
        sample (`torch.Tensor` of shape `(batch, out_channels, height, width)`): The prediction.
    """

    sample: torch.Tensor


class DDPMFacesUNet(ModelMixin, ConfigMixin):
    """U-Net for DDPM on faces. The defaults are the article's network, with 62.4 million parameters.

    Args:
        sample_size (`int` or `(int, int)`, defaults to 64):
            Height and width that a pipeline generates. The network accepts any multiple of
            `patch_size * 2 ** (len(block_out_channels) - 1)`.
        in_channels (`int`, defaults to 3): Channels of the noisy image.
        out_channels (`int`, defaults to 3): Channels of the prediction.
        block_out_channels (`tuple[int]`, defaults to `(64, 128, 256, 512, 1024)`): Width of each level, at least two.
        block_types (`str` or `tuple[str]`, defaults to `"conv"`):
            Type of the blocks between two levels: `"conv"` (the article's convolution, ReLU, BatchNorm),
            `"resnet"` (residual, GroupNorm, SiLU, scale and shift by time) or `"resnet_attn"` (the same with
            self-attention). A single name applies to all levels; a tuple has a name for each pair of adjacent levels.
            The configuration always stores one name per pair.
        mid_block_type (`str`, *optional*): `"resnet"`, `"resnet_attn"`, or `None` for no block at the last level.
        out_block_type (`str`, defaults to `"conv"`):
            `"conv"` (the article's 1x1 convolution) or `"norm_conv"` (GroupNorm, SiLU, zero-initialized 3x3
            convolution).
        patch_size (`int`, defaults to 1):
            Side of the patches of pixels that the network processes as one position. The first level then has
            1 / `patch_size` of the sample's size (space-to-depth, https://huggingface.co/papers/1609.05158), and a
            network with patches of 2 takes about a quarter of the time.
        layers_per_block (`int`, defaults to 1): Residual layers in each resnet block. Conv blocks ignore it.
        time_proj_dim (`int`, defaults to 32): Length of the sinusoidal embedding of the timestep, even.
        time_embedding_dim (`int`, defaults to 32): Size of the time embedding that each block receives.
        time_embedding_layers (`int`, defaults to 1): Linear layers, each with an activation, that compute it.
        act_fn (`str`, defaults to `"relu"`): Activation of the time embedding, `"relu"` or `"silu"`.
        norm_num_groups (`int`, defaults to 32): Groups of each GroupNorm. Must divide the width of its level.
        attention_head_dim (`int`, defaults to 64): Channels of an attention head. Must divide the width of its level.
        dropout (`float`, defaults to 0.0): Probability of dropout within a residual layer.
        num_class_embeds (`int`, *optional*): Number of classes, for class-conditional generation.
        augment_dim (`int`, *optional*):
            Length of the augmentation labels, for training on augmented images. Sampling needs no labels.
        null_class (`bool`, defaults to `False`):
            Whether the network also predicts without a class, as classifier-free guidance needs
            (https://huggingface.co/papers/2207.12598). The label `num_class_embeds` then means no class.
        text_embed_dim (`int`, *optional*):
            Length of the embedding of a text, for generation from prompts. The network also predicts without a text.

    Raises:
        ValueError: An argument has a value that is not allowed. The message names the argument and the allowed values.
    """

    _auto_class = "AutoModel"  # without this package, `AutoModel` loads it with `trust_remote_code=True`
    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["norm"]
    _repeated_blocks = ["ConvBlock", "ResnetLayer", "AttentionLayer"]  # for `compile_repeated_blocks`

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 64,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (64, 128, 256, 512, 1024),
        block_types: str | tuple[str, ...] = "conv",
        mid_block_type: str | None = None,
        out_block_type: str = "conv",
        layers_per_block: int = 1,
        time_proj_dim: int = 32,
        time_embedding_dim: int = 32,
        time_embedding_layers: int = 1,
        act_fn: str = "relu",
        norm_num_groups: int = 32,
        attention_head_dim: int = 64,
        dropout: float = 0.0,
        num_class_embeds: int | None = None,
        augment_dim: int | None = None,
        patch_size: int = 1,
        null_class: bool = False,
        text_embed_dim: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(block_types, str) and _is_list(block_out_channels, 2, MAX_LEVELS):
            block_types = (block_types,) * (len(block_out_channels) - 1)
            self.register_to_config(block_types=block_types)
        self._check_config()
        block_args = {
            "num_layers": layers_per_block,
            "temb_dim": time_embedding_dim,
            "num_groups": norm_num_groups,
            "head_dim": attention_head_dim,
            "dropout": dropout,
        }

        # time
        layers: list[nn.Module] = []
        for i in range(time_embedding_layers):
            layers.append(nn.Linear(time_embedding_dim if i else time_proj_dim, time_embedding_dim))
            layers.append(_ACTIVATIONS[act_fn]())
        self.time_embedding = nn.Sequential(*layers)
        self.class_embedding = None
        if num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds + null_class, time_embedding_dim)
        self.text_embedding = None
        if text_embed_dim is not None:  # without effect at first, so that training may start from any network
            self.text_embedding = _zero_init(nn.Linear(text_embed_dim, time_embedding_dim))
            # As large as normalized embeddings: near 0, every step of Adam would change its direction completely.
            self.null_text_embed = nn.Parameter(torch.randn(text_embed_dim))
        self.augment_embedding = None
        if augment_dim is not None:  # without bias, so that labels of 0 have no effect
            self.augment_embedding = nn.Linear(augment_dim, time_embedding_dim, bias=False)

        # in, down, mid, up, out
        area = patch_size**2
        self.conv_in = nn.Conv2d(in_channels * area, block_out_channels[0], kernel_size=3, padding=1)
        self.down_blocks = nn.ModuleList()
        self.up_blocks = nn.ModuleList()
        for block_type, channels, next_channels in zip(
            block_types, block_out_channels[:-1], block_out_channels[1:], strict=True
        ):
            down_block, up_block = _BLOCKS[block_type]
            self.down_blocks.append(down_block(channels, next_channels, **block_args))
            self.up_blocks.insert(0, up_block(next_channels, channels, **block_args))
        self.mid_block = None
        if mid_block_type is not None:
            self.mid_block = _MID_BLOCKS[mid_block_type](block_out_channels[-1], **block_args)
        self.conv_norm_out = None
        if out_block_type == "norm_conv":
            self.conv_norm_out = GroupNorm(norm_num_groups, block_out_channels[0])
            self.conv_out = _zero_init(nn.Conv2d(block_out_channels[0], out_channels * area, kernel_size=3, padding=1))
        else:
            self.conv_out = nn.Conv2d(block_out_channels[0], out_channels * area, kernel_size=1)

        self.gradient_checkpointing = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "DDPMFacesUNet":
        """Load as [`~diffusers.ModelMixin.from_pretrained`] does, but from safetensors only.

        Raises:
            ValueError: `use_safetensors` is `False`, or this version does not know the configuration.
            OSError: The folder or repository is not found, not accessible or not reachable, or has no safetensors.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("`use_safetensors` must be True: other weights are pickles, which can run code.")
        return super().from_pretrained(pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True})

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, files, name, loaded_keys, *args, **kwargs):
        # diffusers would read pickled shards, and would leave missing weights uninitialized.
        pickles = [str(file) for file in files if not str(file).endswith(".safetensors")]
        if pickles:
            raise ValueError(
                f"{name} lists weights that are not safetensors and cannot be loaded: {', '.join(pickles)}."
            )
        expected, found = set(model.state_dict()), set(loaded_keys)
        missing, unknown = sorted(expected - found), sorted(found - expected)
        if missing or unknown:
            raise ValueError(
                f"The weights of {name} do not match its configuration: {len(missing)} are missing "
                f"({', '.join(missing[:3])}), {len(unknown)} are unknown ({', '.join(unknown[:3])})."
            )
        return super()._load_pretrained_model(model, state_dict, files, name, loaded_keys, *args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """Save as [`~diffusers.ModelMixin.save_pretrained`] does, as safetensors only, with this file beside them.

        Raises:
            ValueError: `safe_serialization` is `False`: pickles are not saved.
        """
        if push_to_hub:
            self.push_to_hub()
        if kwargs:
            raise TypeError(f"save_pretrained() got unexpected arguments: {', '.join(kwargs)}.")
        if safe_serialization is not True:
            raise ValueError("`safe_serialization` must be True: other weights are pickles, which can run code.")
        if not is_main_process:
            return  # all processes have the same weights, and one of them writes
        if Path(save_directory).is_file():
            raise ValueError(f"`save_directory` must be a folder, got the file {str(save_directory)!r}.")
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=save_directory) as staging:
            super().save_pretrained(
                staging, save_function=save_function, variant=variant, max_shard_size=max_shard_size
            )
            shutil.copyfile(__file__, Path(staging, Path(__file__).name))
            # Existing weights are deleted first: loading prefers an index, and old shards would mix with new ones. An
            # interruption leaves a folder without complete weights, never a mixture.
            is_weights = _weights_pattern(variant)
            for path in [path for path in Path(save_directory).iterdir() if is_weights.fullmatch(path.name)]:
                path.unlink(missing_ok=True)
            for path in sorted(Path(staging).iterdir(), key=lambda path: path.suffix == ".json"):  # indices last
                path.replace(Path(save_directory, path.name))

    def push_to_hub(self, *args, **kwargs) -> str:
        """Raise a `NotImplementedError`: only whole pipelines are published, with a model card."""
        raise NotImplementedError(
            "A pipeline is published, not its network: DDPMFacesPipeline(unet, scheduler).push_to_hub(repo_id)."
        )

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        try:
            config = super()._dict_from_json_file(json_file)
        except RecursionError as error:
            raise ValueError(f"{json_file} is nested too deeply.") from error
        if not isinstance(config, dict):
            raise ValueError(f"{json_file} must contain a JSON object, got {type(config).__name__}.")
        allowed = {*inspect.signature(cls.__init__).parameters, "auto_map"} - {"self"}
        unknown = sorted(key for key in config if key not in allowed and not key.startswith("_"))
        if unknown and Path(json_file).name == cls.config_name:
            raise ValueError(
                f"{json_file} has keys that this version of DDPMFacesUNet does not know: {', '.join(unknown)}. It "
                "belongs to another network, or to a later version of ddpm-faces: then update the package."
            )
        return config

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple[dict, dict, dict]:
        # `auto_map` is for `AutoModel` and not an argument of this class.
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def _check_config(self) -> None:
        config = self.config
        for name, (minimum, maximum) in BOUNDS.items():
            if not _is_integer(config[name], minimum, maximum) and not (name in OPTIONAL and config[name] is None):
                or_none = " or None" if name in OPTIONAL else ""
                raise ValueError(
                    f"`{name}` must be an integer from {minimum} to {maximum}{or_none}, got {config[name]!r}."
                )
        if config.time_proj_dim % 2:
            raise ValueError(f"`time_proj_dim` must be even, got {config.time_proj_dim}.")
        if type(config.null_class) is not bool or (config.null_class and config.num_class_embeds is None):
            raise ValueError(
                f"`null_class` must be a boolean, and False without `num_class_embeds`, got {config.null_class!r}."
            )
        if type(config.dropout) not in (int, float) or not 0 <= config.dropout < 1:
            raise ValueError(f"`dropout` must lie in [0, 1), got {config.dropout!r}.")
        widths, block_types = config.block_out_channels, config.block_types
        if not _is_list(widths, 2, MAX_LEVELS) or not all(_is_integer(width, 1, MAX_WIDTH) for width in widths):
            raise ValueError(
                f"`block_out_channels` must be 2 to {MAX_LEVELS} widths from 1 to {MAX_WIDTH}, got {widths!r}."
            )
        if not _is_list(block_types, len(widths) - 1, len(widths) - 1):
            raise ValueError(
                f"`block_types` must be one name, or a name for each step between levels: "
                f"{len(widths)} `block_out_channels` need {len(widths) - 1}, got {block_types!r}."
            )
        choices: list[tuple[str, str | None, tuple[str | None, ...]]]
        choices = [("block_types", block_type, tuple(_BLOCKS)) for block_type in block_types]
        choices += [("mid_block_type", config.mid_block_type, (None, *_MID_BLOCKS))]
        choices += [("out_block_type", config.out_block_type, ("conv", "norm_conv"))]
        choices += [("act_fn", config.act_fn, tuple(_ACTIVATIONS))]
        for name, value, allowed in choices:
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
        size, multiple = config.sample_size, self.size_multiple
        sides = size if _is_list(size, 2, 2) else [size]
        if not all(_is_integer(side, 1, MAX_SIDE) and side % multiple == 0 for side in sides):
            raise ValueError(
                f"`sample_size` must be a side or (height, width), each a multiple of {multiple} (`patch_size` * 2 ** "
                f"(number of levels - 1)) and at most {MAX_SIDE}, got {size!r}."
            )

    @property
    def size_multiple(self) -> int:
        """Height and width of a sample must be multiples of this."""
        return self.config.patch_size * 2 ** (len(self.config.block_out_channels) - 1)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        augment_labels: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
    ) -> DDPMFacesUNetOutput | tuple[torch.Tensor]:
        """Predict the noise on `sample`, or the quantity of the scheduler's `prediction_type`.

        Args:
            sample (`torch.Tensor` of shape `(batch, in_channels, height, width)`): x_t.
            timestep (`int`, `float` or `torch.Tensor` of shape `()`, `(1,)` or `(batch,)`): t of each image.
            class_labels (`torch.Tensor` of shape `(batch,)`, integer, *optional*):
                Class of each image, 0 to `num_class_embeds - 1`. With a `null_class`, `num_class_embeds` means no
                class, and labels may be left out; without it, a network with classes requires them.
            return_dict (`bool`, defaults to `True`): Whether to return an output class, or a tuple.
            augment_labels (`torch.Tensor` of shape `(batch, augment_dim)`, *optional*):
                How each image was augmented. Without labels, as with labels of 0, images count as not augmented.
                Training must always pass them, because a distributed run needs each parameter in each forward pass.
            text_embeds (`torch.Tensor` of shape `(batch, text_embed_dim)`, *optional*):
                Embedding of the text of each image, for a network with a `text_embed_dim`. Rows that equal
                `null_text_embed`, like a missing tensor, mean no text.

        Raises:
            ValueError: A shape or an argument is not allowed. The message names the allowed values.
        """
        self._check_inputs(sample, class_labels, augment_labels, text_embeds)

        # 1. time
        if isinstance(timestep, torch.Tensor):
            timesteps = timestep.to(sample.device).expand(sample.shape[0])
        else:  # as a tensor, it is not a constant of the graph, so `torch.compile` compiles only once
            timesteps = torch.full((sample.shape[0],), timestep, device=sample.device)
        # The article's embedding: sine then cosine, frequencies from 1 to 1 / 10000, always in float32.
        t_emb = get_timestep_embedding(timesteps, self.config.time_proj_dim)  # (batch, time_proj_dim)
        # The dtype of the sample is that of the computation. Layerwise casting may store weights in another one.
        temb = self.time_embedding(t_emb.to(sample.dtype))  # (batch, time_embedding_dim)
        if self.class_embedding is not None:
            if class_labels is None:
                class_labels = torch.full_like(timesteps, self.config.num_class_embeds, dtype=torch.int64)
            temb = temb + self.class_embedding(class_labels)
        if self.text_embedding is not None:
            if text_embeds is None:
                text_embeds = self.null_text_embed.expand(len(sample), -1)
            # Embeddings of any encoder get the same scale, which training cannot shrink while they still mean nothing.
            text_embeds = F.layer_norm(text_embeds.float(), text_embeds.shape[-1:]).to(sample.dtype)
            temb = temb + self.text_embedding(text_embeds)
        if self.augment_embedding is not None and augment_labels is not None:
            temb = temb + self.augment_embedding(augment_labels.to(sample.dtype))

        # 2. in
        if self.config.patch_size > 1:
            sample = F.pixel_unshuffle(sample, self.config.patch_size)
        hidden_states = self.conv_in(sample)

        # 3. down
        skips = []
        for block in self.down_blocks:
            hidden_states, skip = self._run(block, hidden_states, temb)
            skips.append(skip)

        # 4. mid
        if self.mid_block is not None:
            hidden_states = self._run(self.mid_block, hidden_states, temb)

        # 5. up
        for block in self.up_blocks:
            hidden_states = self._run(block, hidden_states, temb, skips.pop())

        # 6. out
        if self.conv_norm_out is not None:
            hidden_states = F.silu(self.conv_norm_out(hidden_states))
        sample = self.conv_out(hidden_states)
        if self.config.patch_size > 1:
            sample = F.pixel_shuffle(sample, self.config.patch_size)

        if not return_dict:
            return (sample,)
        return DDPMFacesUNetOutput(sample=sample)

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable | None = None) -> None:
        """Store only the inputs of each block, and recompute the rest in the backward pass."""
        super().enable_gradient_checkpointing(gradient_checkpointing_func or _checkpoint)

    def set_attention_backend(self, backend: str) -> None:
        """Accept `"native"` only: attention is always PyTorch's `scaled_dot_product_attention`.

        PyTorch chooses the kernel. `torch.nn.attention.sdpa_kernel` restricts the choice.

        Raises:
            ValueError: `backend` is not `"native"`.
        """
        if backend != "native":
            raise ValueError(
                f"`backend` must be 'native', got {backend!r}: DDPMFacesUNet always calls PyTorch's "
                "scaled_dot_product_attention. Choose its kernel with torch.nn.attention.sdpa_kernel."
            )

    def _run(self, block: nn.Module, *inputs):
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    def _check_inputs(
        self,
        sample: torch.Tensor,
        class_labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None,
        text_embeds: torch.Tensor | None,
    ) -> None:
        if sample.ndim != 4 or sample.shape[1] != self.config.in_channels:
            raise ValueError(
                f"`sample` must be of shape (batch, {self.config.in_channels}, height, width), got "
                f"{tuple(sample.shape)}."
            )
        if sample.shape[2] % self.size_multiple or sample.shape[3] % self.size_multiple:
            raise ValueError(
                f"`sample` must have a height and a width that are multiples of {self.size_multiple}, got "
                f"{sample.shape[2]} x {sample.shape[3]}."
            )
        if class_labels is None and self.class_embedding is not None and not self.config.null_class:
            raise ValueError(
                "`class_labels` must be given: this network has classes (`num_class_embeds` is "
                f"{self.config.num_class_embeds})."
            )
        if class_labels is not None and self.class_embedding is None:
            raise ValueError("`class_labels` must be None: this network has no classes (`num_class_embeds` is None).")
        if text_embeds is not None and self.text_embedding is None:
            raise ValueError("`text_embeds` must be None: this network has no texts (`text_embed_dim` is None).")
        text_shape = (sample.shape[0], self.config.text_embed_dim)
        if text_embeds is not None and text_embeds.shape != text_shape:
            raise ValueError(
                f"`text_embeds` must be of shape (batch, text_embed_dim), here {text_shape}, got "
                f"{tuple(text_embeds.shape)}."
            )
        if augment_labels is not None and self.augment_embedding is None:
            raise ValueError(
                "`augment_labels` must be None: this network has no augmentation labels (`augment_dim` is None)."
            )
        augment_shape = (sample.shape[0], self.config.augment_dim)
        if augment_labels is not None and augment_labels.shape != augment_shape:
            raise ValueError(
                f"`augment_labels` must be of shape (batch, augment_dim), here {augment_shape}, got "
                f"{tuple(augment_labels.shape)}."
            )


# The article's blocks


class ConvBlock(nn.Module):
    """Two 3x3 convolutions with ReLU and BatchNorm, the time embedding added between them, then resampling."""

    def __init__(self, in_channels: int, out_channels: int, temb_dim: int, resample: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.time_emb_proj = nn.Linear(temb_dim, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.resample = resample

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        hidden_states = self.norm1(F.relu(self.conv1(hidden_states)))
        hidden_states = hidden_states + F.relu(self.time_emb_proj(temb))[:, :, None, None]
        hidden_states = self.norm2(F.relu(self.conv2(hidden_states)))
        return self.resample(hidden_states)


class ConvDownBlock(nn.Module):
    """The article's down block. Its skip connection is its output, at half the size."""

    def __init__(self, in_channels: int, out_channels: int, temb_dim: int, **kwargs) -> None:
        super().__init__()
        downsample = nn.Conv2d(out_channels, out_channels, kernel_size=4, stride=2, padding=1)
        self.block = ConvBlock(in_channels, out_channels, temb_dim, downsample)

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        hidden_states = self.block(hidden_states, temb)
        return hidden_states, [hidden_states]


class ConvUpBlock(nn.Module):
    """The article's up block, applied to its input concatenated with the skip connection."""

    def __init__(self, in_channels: int, out_channels: int, temb_dim: int, **kwargs) -> None:
        super().__init__()
        upsample = nn.ConvTranspose2d(out_channels, out_channels, kernel_size=4, stride=2, padding=1)
        self.block = ConvBlock(2 * in_channels, out_channels, temb_dim, upsample)

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor, skips: list[torch.Tensor]) -> torch.Tensor:
        return self.block(torch.cat([hidden_states, skips[0]], dim=1), temb)


# Residual blocks


class ResnetLayer(nn.Module):
    """x + conv(dropout(silu(scale * norm(conv(silu(norm(x)))) + shift))), scale and shift from the timestep (ADM)."""

    def __init__(self, in_channels: int, out_channels: int, temb_dim: int, num_groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = GroupNorm(num_groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.time_emb_proj = nn.Linear(temb_dim, 2 * out_channels)
        self.norm2 = GroupNorm(num_groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zero_init(nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1))
        self.conv_shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        residual = self.conv1(F.silu(self.norm1(hidden_states)))
        scale, shift = self.time_emb_proj(temb)[:, :, None, None].chunk(2, dim=1)
        residual = F.silu(self.norm2(residual) * (1 + scale) + shift)
        residual = self.conv2(self.dropout(residual))
        return self.conv_shortcut(hidden_states) + residual


class AttentionLayer(nn.Module):
    """x + out(attention(norm(x))) over all positions."""

    def __init__(self, channels: int, num_groups: int, head_dim: int) -> None:
        super().__init__()
        # A level that is narrower than a head has one head of its own width.
        head_dim = min(head_dim, channels)
        if channels % head_dim:
            raise ValueError(f"`attention_head_dim` ({head_dim}) must divide the width of its level ({channels}).")
        self.num_heads = channels // head_dim
        self.norm = GroupNorm(num_groups, channels)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, kernel_size=1)
        self.to_out = _zero_init(nn.Conv2d(channels, channels, kernel_size=1))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = hidden_states.shape
        qkv = self.to_qkv(self.norm(hidden_states))  # (batch, 3 * channels, height, width)
        qkv = qkv.view(batch, 3, self.num_heads, channels // self.num_heads, height * width)
        query, key, value = qkv.transpose(-1, -2).unbind(dim=1)  # each (batch, heads, height * width, head_dim)
        attended = _attend(query, key, value)
        attended = attended.transpose(-1, -2).reshape(batch, channels, height, width)
        return hidden_states + self.to_out(attended)


class ResnetMidBlock(nn.Module):
    """Residual layer, attention, residual layer, at the last level."""

    def __init__(
        self,
        channels: int,
        temb_dim: int,
        num_groups: int,
        head_dim: int,
        dropout: float,
        with_attention: bool = False,
        **kwargs,
    ) -> None:
        super().__init__()
        self.resnet1 = ResnetLayer(channels, channels, temb_dim, num_groups, dropout)
        self.attention = AttentionLayer(channels, num_groups, head_dim) if with_attention else nn.Identity()
        self.resnet2 = ResnetLayer(channels, channels, temb_dim, num_groups, dropout)

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        hidden_states = self.resnet1(hidden_states, temb)
        hidden_states = self.attention(hidden_states)
        return self.resnet2(hidden_states, temb)


class ResnetDownBlock(nn.Module):
    """Residual layers at one level, each with a skip connection, then a strided convolution to the next level."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        temb_dim: int,
        num_groups: int,
        head_dim: int,
        dropout: float,
        with_attention: bool = False,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetLayer(in_channels, in_channels, temb_dim, num_groups, dropout) for _ in range(num_layers)
        )
        self.attentions = nn.ModuleList(
            AttentionLayer(in_channels, num_groups, head_dim) if with_attention else nn.Identity()
            for _ in range(num_layers)
        )
        self.downsample = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1)

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        skips = []
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            hidden_states = attention(resnet(hidden_states, temb))
            skips.append(hidden_states)
        return self.downsample(hidden_states), skips


class ResnetUpBlock(nn.Module):
    """Upsampling, then residual layers, each applied to its input concatenated with a skip connection."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        temb_dim: int,
        num_groups: int,
        head_dim: int,
        dropout: float,
        with_attention: bool = False,
    ) -> None:
        super().__init__()
        self.upsample = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.resnets = nn.ModuleList(
            ResnetLayer(2 * out_channels, out_channels, temb_dim, num_groups, dropout) for _ in range(num_layers)
        )
        self.attentions = nn.ModuleList(
            AttentionLayer(out_channels, num_groups, head_dim) if with_attention else nn.Identity()
            for _ in range(num_layers)
        )

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor, skips: list[torch.Tensor]) -> torch.Tensor:
        hidden_states = self.upsample(_enlarge(hidden_states))
        for resnet, attention, skip in zip(self.resnets, self.attentions, reversed(skips), strict=True):
            hidden_states = attention(resnet(torch.cat([hidden_states, skip], dim=1), temb))
        return hidden_states


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if _trains_in_bfloat16_on_cpu(query):
        # The gradient of `F.scaled_dot_product_attention` is up to ten times as slow (PyTorch 2.13).
        return (query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)).softmax(dim=-1).to(value.dtype) @ value
    return F.scaled_dot_product_attention(query, key, value)


def _enlarge(hidden_states: torch.Tensor) -> torch.Tensor:
    """Repeat each position in a square of 2x2."""
    if torch.compiler.is_compiling():
        # In bfloat16 on the CPU, the compiled gradient of `F.interpolate` is zero (PyTorch 2.13).
        return hidden_states.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")


def _checkpoint(block: nn.Module, *inputs):
    if (
        torch.compiler.is_compiling()
    ):  # contexts are neither supported nor needed: a compiled graph updates buffers once
        return checkpoint(block, *inputs, use_reentrant=False)
    contexts = nullcontext(), _RunningStatisticsKept(block)
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: contexts)


class _RunningStatisticsKept:
    """Keeps BatchNorm from counting a batch twice when gradient checkpointing repeats its forward pass.

    This is a class because each backward pass over a graph enters it again, which `contextlib.contextmanager` forbids.
    """

    def __init__(self, block: nn.Module) -> None:
        norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self.momenta = {norm: norm.momentum for norm in norms}

    def __enter__(self) -> None:
        for norm in self.momenta:
            norm.momentum = 0.0

    def __exit__(self, *exception) -> None:
        for norm, momentum in self.momenta.items():
            norm.momentum = momentum


def _weights_pattern(variant: str | None) -> re.Pattern:
    """Return a pattern for diffusers' names of a variant's weights: a single file, shards, and the index of shards."""
    infix = "" if variant is None else re.escape(f".{variant}")
    return re.compile(
        rf"diffusion_pytorch_model(\.safetensors\.index{infix}\.json|{infix}(-\d+-of-\d+)?\.safetensors)"
    )


def _is_integer(value: Any, minimum: int, maximum: int) -> bool:
    return type(value) is int and minimum <= value <= maximum


def _is_list(value: Any, shortest: int, longest: int) -> bool:
    return isinstance(value, (list, tuple)) and shortest <= len(value) <= longest


class GroupNorm(nn.GroupNorm):
    """PyTorch's GroupNorm, with a faster gradient in bfloat16 on CPUs.

    Raises:
        ValueError: `num_groups` does not divide `num_channels`.
    """

    def __init__(self, num_groups: int, num_channels: int) -> None:
        if num_channels % num_groups:
            raise ValueError(
                f"`norm_num_groups` ({num_groups}) must divide the width of each level, here {num_channels}."
            )
        super().__init__(num_groups, num_channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        group_size, positions = self.num_channels // self.num_groups, hidden_states[0, 0].numel()
        # Where PyTorch 2.13 needs several times as long in bfloat16 as in float32.
        is_slow = group_size <= 4 or (group_size < 16 and positions < 1024)
        if is_slow and self.weight.dtype == torch.float32 and _trains_in_bfloat16_on_cpu(hidden_states):
            return super().forward(hidden_states.float()).to(hidden_states.dtype)
        return super().forward(hidden_states)


def _trains_in_bfloat16_on_cpu(hidden_states: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and hidden_states.dtype == torch.bfloat16 and hidden_states.device.type == "cpu"


def _zero_init(layer: nn.Module) -> nn.Module:
    """Initialize a layer with zeros, so that a deep network starts like a shallow one."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


_ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}
_BLOCKS: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {
    "conv": (ConvDownBlock, ConvUpBlock),
    "resnet": (ResnetDownBlock, ResnetUpBlock),
    "resnet_attn": (partial(ResnetDownBlock, with_attention=True), partial(ResnetUpBlock, with_attention=True)),
}
_MID_BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "resnet": ResnetMidBlock,
    "resnet_attn": partial(ResnetMidBlock, with_attention=True),
}
