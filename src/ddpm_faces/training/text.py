"""The text side of a run: tokenizer and encoder of the captions, and the network that is trained with them."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..pipeline_ddpm_faces import DDPMFacesPipeline, Text, pooled, tokenize
from ..text import TRAINED, make_text_encoder, make_tokenizer, shortened
from ..unet_ddpm_faces import DDPMFacesUNet, DDPMFacesUNetOutput
from .checkpoint import TEXT_FOLDER


if TYPE_CHECKING:
    from .config import TrainingConfig
    from .data import TrainingData

ENCODER_LR_SCALE = 0.01
SHORTENED = 0.5  # share of the captions that lose phrases
_CAPTIONS = 3  # key of the random stream, beside those of `data.draws`


class PromptedUNet(nn.Module):
    """The network with the text encoder that is trained with it, as one module for optimizer, EMA and checkpoints.

    Args:
        unet ([`DDPMFacesUNet`]): The network, with a `text_embed_dim`.
        text_encoder (`torch.nn.Module`, *optional*): The encoder, unless embeddings come with the batch.
    """

    def __init__(self, unet: DDPMFacesUNet, text_encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    @property
    def config(self) -> Any:
        return self.unet.config

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        is_given: torch.Tensor,
        embeds: Any = None,
        input_ids: Any = None,
        attention_mask: Any = None,
        **kwargs: torch.Tensor,
    ) -> DDPMFacesUNetOutput:
        """Predict as the network does, for the texts of [`TextSide.batch`]."""
        if self.text_encoder is not None:
            embeds = pooled(self.text_encoder, input_ids, attention_mask)
        text_embeds = Text(embeds, is_given).for_network(self.unet)
        return self.unet(sample, timestep, text_embeds=text_embeds, **kwargs)


@dataclass
class TextSide:
    """Tokenizer and encoder of captions.

    Args:
        tokenizer (`Any`): The tokenizer, of transformers.
        text_encoder (`torch.nn.Module`): The encoder, of transformers.
        is_trained (`bool`): Whether the encoder is trained with the network. Embeddings of others are kept.
        is_named (`bool`): Whether `text_encoder` of the configuration names it, so that checkpoints do not need it.
    """

    tokenizer: Any
    text_encoder: Any
    is_trained: bool
    is_named: bool = False
    known: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return self.text_encoder.config.hidden_size

    def batch(self, captions: Sequence[str], is_kept: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the arguments of [`PromptedUNet`] for the captions of a batch.

        Args:
            captions (`list[str]`): A caption for each image, or an empty text.
            is_kept (`torch.Tensor` of shape `(batch,)`, `torch.bool`): `False` for captions to hide.
            device (`torch.device`): Device of the results.
        """
        tokens = tokenize(self.tokenizer, self.text_encoder, captions)
        values = tokens if self.is_trained else {"embeds": self._embeds(captions, tokens)}
        # The CPU does not wait for the device, where `is_kept` is.
        is_given = tokens["attention_mask"].any(dim=1).to(device, non_blocking=True) & is_kept.to(device)
        return {"is_given": is_given, **{name: value.to(device, non_blocking=True) for name, value in values.items()}}

    @torch.no_grad()
    def _embeds(self, captions: Sequence[str], tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        new = [i for i, caption in enumerate(captions) if caption not in self.known]
        if new:
            device = next(self.text_encoder.parameters()).device
            embeds = pooled(self.text_encoder, **{name: ids[new].to(device) for name, ids in tokens.items()}).cpu()
            self.known |= {captions[i]: embed for i, embed in zip(new, embeds, strict=True)}
        return torch.stack([self.known[caption] for caption in captions])

    def save(self, folder: Path) -> None:
        """Save what a resumed run needs beside the weights of the checkpoint."""
        self.tokenizer.save_pretrained(folder)
        if self.is_trained:  # the checkpoint has the weights
            (folder / "config.json").write_text(self.text_encoder.config.to_json_string(), "utf-8")
        else:
            self.text_encoder.save_pretrained(folder)


def parameter_groups(network: nn.Module) -> list[dict[str, Any]]:
    """Return the parameters of a network for its optimizer; a text encoder has a hundredth of the learning rate.

    At a tenth of it, a new encoder still moves all texts towards the same embedding: until the network has learned to
    read them, their differences only disturb it.
    """
    if not isinstance(network, PromptedUNet) or network.text_encoder is None:
        return [{"params": list(network.parameters())}]
    return [
        {"params": list(network.unet.parameters())},
        {"params": list(network.text_encoder.parameters()), "lr_scale": ENCODER_LR_SCALE},
    ]


def make_text_side(
    config: "TrainingConfig", data: "TrainingData", pretrained: DDPMFacesPipeline | None, checkpoint: Path | None
) -> TextSide | None:
    """Make the text side of a run, or return `None` for a run without captions.

    The encoder is, in this order, `text_encoder` of the configuration, that of the run to resume, that of the
    pretrained pipeline, or a new one for the words of the captions.

    Raises:
        ValueError: There are no captions, or the encoder cannot be loaded.
    """
    if config.caption_column is None:
        return None
    if config.text_encoder is not None:
        return replace(_pretrained(config.text_encoder), is_named=True)
    if checkpoint is not None and (checkpoint / TEXT_FOLDER).is_dir():
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        folder = checkpoint / TEXT_FOLDER
        encoder_config = AutoConfig.from_pretrained(folder)
        if not getattr(encoder_config, TRAINED, False):
            return _pretrained(str(folder))
        return TextSide(AutoTokenizer.from_pretrained(folder), AutoModel.from_config(encoder_config), is_trained=True)
    if pretrained is not None and pretrained.text_encoder is not None:
        encoder = pretrained.text_encoder
        return TextSide(pretrained.tokenizer, encoder, is_trained=getattr(encoder.config, TRAINED, False))
    try:
        tokenizer = make_tokenizer(data.all_captions())
    except ValueError as error:
        raise ValueError(f"`caption_column` {config.caption_column!r} contains no words.") from error
    return TextSide(tokenizer, make_text_encoder(tokenizer, config.text_embed_dim), is_trained=True)


def _pretrained(name: str) -> TextSide:
    """Load an encoder of transformers, whose weights stay as they are."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextModel, T5EncoderModel

    path = os.path.expanduser(name)
    try:
        config = AutoConfig.from_pretrained(path)
        # CLIP and T5 have other parts, which are not needed.
        cls = {"clip": CLIPTextModel, "clip_text_model": CLIPTextModel, "t5": T5EncoderModel}.get(config.model_type)
        encoder = (cls or AutoModel).from_pretrained(path, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"`text_encoder` {name!r} cannot be loaded: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return TextSide(tokenizer, encoder.eval().requires_grad_(False), is_trained=False)


def choose_captions(captions: Sequence[Sequence[str]], seed: int, images_seen: int, share: slice) -> list[str]:
    """Choose a caption for each image of a batch, and shorten some of them.

    Args:
        captions (`list[list[str]]`): The captions of the images of this process.
        seed (`int`): Seed of the run.
        images_seen (`int`): Images trained on before this batch.
        share (`slice`): The part of the batch that belongs to this process.

    Returns:
        `list[str]`: A caption for each image; an empty text for an image without captions.
    """
    chosen = []
    for place, texts in zip(range(share.start, share.stop), captions, strict=True):
        rng = np.random.default_rng((seed, images_seen, _CAPTIONS, place))
        text = texts[int(rng.integers(len(texts)))] if texts else ""
        chosen.append(shortened(text, rng) if rng.random() < SHORTENED else text)
    return chosen


def sample_prompts(captions: Iterable[str], count: int) -> list[str]:
    """Choose prompts for sample grids: captions of the training data, each once, evenly from its frequent ones."""
    frequent = [text for text, _ in Counter(captions).most_common(4 * count)]
    return frequent[:: max(1, len(frequent) // count)][:count]


def first_captions(captions: Sequence[Sequence[str]]) -> list[str]:
    """Return the first caption of each image, or an empty text."""
    return [texts[0] if texts else "" for texts in captions]


def split_weights(weights: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    """Return the weights of a part of [`PromptedUNet`], or all weights of a network without texts."""
    prefix = f"{part}."
    if not any(name.startswith("unet.") for name in weights):
        return weights
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
