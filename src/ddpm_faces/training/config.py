"""The configuration of a training run: one dataclass from which `arguments` builds the command line."""

import inspect
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

from ..checks import MAX_INTEGER
from ..hub.card import check_license


# The groups of `--help` in their order, each with the line below its name.
GROUPS = {
    "Data": "where the training images come from and how they are prepared",
    "Network": "arguments of DDPMFacesUNet",
    "Diffusion": "arguments of DDPMFacesScheduler, and the loss",
    "Distillation": "what the student learns",
    "Optimization": "all lengths are in images, so they mean the same at any batch size and on any hardware",
    "Validation": "what is measured and sampled during training; it does not affect what the network learns",
    "Run": "where the run is saved, how it resumes, and when it stops",
    "Hub": "how the finished model is published",
}


# The minimum number of samples, and of held-out images, that each field needs.
LEAST_PICTURES = {"evaluate_every_images": 20, "audit_every_images": 100}


def _field(default, group: str, help: str):
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(metadata={"help": help, "group": group}, **factory)


@dataclass
class TrainingConfig:
    """Everything that determines a training run. Lengths are in images, so they do not depend on the hardware.

    The defaults train on generated drawings of faces and take a few minutes on two CPU cores.

    Raises:
        ValueError: A field has an invalid value. The message names the field and the allowed values.
    """

    dataset_name: str | None = _field(
        None, "Data", "Dataset on the Hub (`user/name`) or in a local folder (default: drawn faces)."
    )
    dataset_config_name: str | None = _field(
        None, "Data", "Configuration of the dataset (default: the dataset's own default)."
    )
    dataset_split: str = _field("train", "Data", "Split of the dataset to train on.")
    train_data_dir: str | None = _field(None, "Data", "Local folder of images to train on, instead of `dataset_name`.")
    image_column: str | None = _field(
        None, "Data", "Dataset column with the images (default: the first one that contains images)."
    )
    label_column: str | None = _field(
        None, "Data", "Dataset column of class labels, or `folder` for the names of subfolders (default: no classes)."
    )
    caption_column: str | None = _field(
        None,
        "Data",
        "Dataset column of captions, or `txt` for text files beside the images (default: no captions).",
    )
    streaming: bool = _field(
        False, "Data", "Read the dataset during training instead of caching it, for datasets too large for the disk."
    )
    shuffle_block_size: int = _field(1024, "Data", "Number of images that are shuffled together when streaming.")
    cache_dir: str | None = _field(
        None, "Data", "Folder for decoded images and downloaded datasets (default: beside the Hub's cache)."
    )
    skip_unreadable: bool = _field(
        False, "Data", "Skip and list images that cannot be read, instead of refusing to start."
    )
    max_image_pixels: int = _field(
        2**29, "Data", "Refuse images with more pixels than this, because they take too much memory."
    )
    max_train_samples: int | None = _field(None, "Data", "Number of images to use, from the first (default: all).")
    num_drawn_images: int = _field(4096, "Data", "Number of faces to draw when no dataset is given.")
    resolution: list[int] = _field([32], "Data", "Size of the images in pixels: one side, or height and width.")
    crop: Literal["center", "random"] = _field(
        "center",
        "Data",
        "Part to keep of an image with another aspect ratio: the center, or a new random part each time.",
    )
    random_flip: bool = _field(False, "Data", "Mirror each image with a probability of one half.")
    augment_probability: float = _field(
        0.0,
        "Data",
        "Probability of each of EDM's augmentations, which the network is told about; EDM uses 0.15 for faces.",
    )
    dataloader_num_workers: int = _field(
        0,
        "Data",
        "Number of processes that load batches; use some when streaming or when the images do not fit in memory.",
    )

    pretrained_model_name_or_path: str | None = _field(
        None,
        "Network",
        "Pipeline to fine-tune, a folder or `user/name` on the Hub; sets the network and the noise schedule.",
    )
    in_channels: Literal[1, 3, 4] = _field(
        3, "Network", "Number of image channels: 1 for grayscale, 3 for RGB, 4 for RGBA."
    )
    block_out_channels: list[int] = _field(
        [32, 64, 128], "Network", "Number of channels at each level, from the highest resolution to the lowest."
    )
    block_types: list[str] = _field(
        ["resnet", "resnet"], "Network", "Blocks between adjacent levels: conv, resnet or resnet_attn."
    )
    mid_block_type: Literal["resnet", "resnet_attn", "none"] = _field(
        "resnet_attn", "Network", "Block at the lowest level."
    )
    out_block_type: Literal["conv", "norm_conv"] = _field("norm_conv", "Network", "Layers that produce the output.")
    patch_size: int = _field(
        1,
        "Network",
        "Side of the patches of pixels that the network sees as one position; 2 takes about a quarter of the time.",
    )
    layers_per_block: int = _field(1, "Network", "Number of residual layers in each resnet block.")
    time_proj_dim: int = _field(32, "Network", "Size of the sinusoidal embedding of the timestep.")
    time_embedding_dim: int = _field(128, "Network", "Size of the time embedding that each block receives.")
    time_embedding_layers: int = _field(
        2, "Network", "Number of linear layers from the sinusoidal embedding to the time embedding."
    )
    act_fn: Literal["relu", "silu"] = _field("silu", "Network", "Activation function of the time embedding.")
    norm_num_groups: int = _field(8, "Network", "Number of groups in each GroupNorm.")
    attention_head_dim: int = _field(64, "Network", "Number of channels in each attention head.")
    dropout: float = _field(0.0, "Network", "Dropout probability in residual layers.")
    num_class_embeds: int | None = _field(
        None, "Network", "Number of classes (default: as many as `label_column` has)."
    )
    text_encoder: str | None = _field(
        None,
        "Network",
        "Encoder of captions, a folder or a model of transformers on the Hub, such as openai/clip-vit-base-patch32, "
        "whose weights stay as they are (default: a small one that is trained with the network).",
    )
    text_embed_dim: int = _field(128, "Network", "Length of the embedding of a caption, without a `text_encoder`.")
    gradient_checkpointing: bool = _field(
        False, "Network", "Recompute activations in the backward pass, which saves memory and costs time."
    )

    num_train_timesteps: int = _field(300, "Diffusion", "Number of timesteps T of the diffusion process.")
    beta_start: float = _field(1e-4, "Diffusion", "Beta at the first timestep.")
    beta_end: float = _field(0.02, "Diffusion", "Beta at the last timestep.")
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = _field(
        "squaredcos_cap_v2",
        "Diffusion",
        "Shape of the beta schedule; squaredcos_cap_v2 (cosine) ignores `beta_start` and `beta_end`.",
    )
    variance_type: Literal["fixed_small", "fixed_large", "learned_range"] = _field(
        "fixed_small",
        "Diffusion",
        "Variance of a DDPM sampling step; with learned_range the network predicts it as well.",
    )
    clip_sample: bool = _field(True, "Diffusion", "Clip the predicted image to [-1, 1] at each sampling step.")
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = _field(
        "v_prediction", "Diffusion", "Quantity that the network predicts: the noise, the image, or the velocity v."
    )
    timestep_spacing: Literal["leading", "trailing", "linspace"] = _field(
        "leading", "Diffusion", "Spacing of the timesteps when sampling takes fewer than T steps."
    )
    rescale_betas_zero_snr: bool = _field(
        False, "Diffusion", "Rescale the betas to zero terminal SNR, which makes the last timestep pure noise."
    )
    low_discrepancy_timesteps: bool = _field(
        False,
        "Diffusion",
        "Spread the timesteps evenly over consecutive images, which makes the gradients less noisy.",
    )
    condition_dropout: float = _field(
        0.1,
        "Diffusion",
        "Probability of hiding the class or caption of an image, so that the network also learns to do without: "
        "classifier-free guidance needs this; 0 turns it off.",
    )
    loss_type: Literal["l2", "l1", "huber"] = _field("l2", "Diffusion", "Loss between prediction and target.")
    snr_gamma: float = _field(
        float("inf"),
        "Diffusion",
        "Gamma of the Min-SNR loss weights; inf weights by the error in the noise, 0 turns weighting off.",
    )

    snr_floor: float = _field(
        0.0,
        "Diffusion",
        "Lowest loss weight, up to `snr_gamma`; 1 makes errors at high noise, where captions and classes say most, "
        "count as much as others.",
    )

    seed: int = _field(
        0, "Optimization", "Seed of the initial weights, the order of the images, the noise and the sample grids."
    )
    train_batch_size: int = _field(
        32, "Optimization", "Number of images per optimizer step, shared equally among all processes."
    )
    device_batch_size: int | None = _field(
        None,
        "Optimization",
        "Largest micro-batch on one device; larger batches accumulate gradients (default: no accumulation).",
    )
    max_train_images: int = _field(
        40_000, "Optimization", "Length of the run in images, counting an image each time it is used."
    )
    learning_rate: float = _field(1e-3, "Optimization", "Learning rate after the warm-up.")
    lr_scheduler: Literal["constant", "linear", "cosine"] = _field(
        "cosine", "Optimization", "Decay of the learning rate after the warm-up; linear and cosine end at 0."
    )
    lr_warmup_images: int = _field(
        2_000, "Optimization", "Length of the warm-up in images, during which the learning rate rises from 0."
    )
    adam_beta1: float = _field(0.9, "Optimization", "AdamW's beta1, the decay rate of the mean of the gradient.")
    adam_beta2: float = _field(
        0.999, "Optimization", "AdamW's beta2, the decay rate of the mean of the squared gradient."
    )
    adam_weight_decay: float = _field(0.0, "Optimization", "AdamW's weight decay; 0 makes it Adam.")
    adam_epsilon: float = _field(1e-8, "Optimization", "AdamW's epsilon, added to the denominator.")
    max_grad_norm: float = _field(
        1.0, "Optimization", "Maximum norm of the gradient, to which larger ones are clipped; 0 turns clipping off."
    )
    use_ema: bool = _field(
        True,
        "Optimization",
        "Keep an exponential moving average (EMA) of the weights, for sampling and for the finished pipeline.",
    )
    ema_half_life_images: int = _field(4_000, "Optimization", "Half-life of the EMA in images.")
    ema_rampup_ratio: float = _field(
        0.1,
        "Optimization",
        "Upper limit of the EMA's half-life as a fraction of the images seen, so that an early EMA stays recent.",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _field(
        None,
        "Optimization",
        "Precision of the network; the rest is float32 (default: the setting of `accelerate launch`).",
    )

    validation_split: str | None = _field(
        None, "Validation", "Split of held-out images (default: images set aside from `dataset_split`)."
    )
    num_validation_images: int = _field(64, "Validation", "Number of held-out images; 0 turns validation off.")
    validate_every_images: int = _field(
        10_000, "Validation", "Interval between measurements of the held-out loss, in images; 0: only at the end."
    )
    early_stopping_patience: int | None = _field(
        None,
        "Validation",
        "Stop with the best weights after this many validations without a better loss (default: never).",
    )
    sample_every_images: int = _field(
        10_000, "Validation", "Interval between sample grids, in images; 0: only at the end."
    )
    sample_prompts: list[str] | None = _field(
        None, "Validation", "Prompts of the sample grids, in turn (default: some captions of the data)."
    )
    num_samples: int = _field(16, "Validation", "Number of samples in a grid.")
    sample_inference_steps: int = _field(
        20,
        "Validation",
        "Number of DPM-Solver++ steps for grids during training; the final grid uses all T steps of DDPM.",
    )
    sample_sigma_min: float = _field(
        0.02,
        "Validation",
        "Noise-to-signal ratio at the last of these steps; 0.1 gives cleaner images after a short run.",
    )

    evaluate_every_images: int = _field(
        0,
        "Validation",
        "Interval between evaluations of samples, as with `ddpm-faces evaluate`, in images; 0: never.",
    )
    audit_every_images: int = _field(
        0, "Validation", "Interval between audits of samples for copies of training images, in images; 0: never."
    )
    stop_on_copies: bool = _field(
        False, "Validation", "Stop when an audit finds copies, with the weights of the last audit without copies."
    )
    num_evaluation_samples: int = _field(200, "Validation", "Number of samples to evaluate and to audit.")

    output_dir: str = _field(
        "ddpm-faces-model", "Run", "Folder for checkpoints, sample grids, the log and the finished pipeline."
    )
    guidance_scale: float = _field(
        1.0,
        "Run",
        "Scale of classifier-free guidance for classes or captions, in samples and as the model's default; 1: off.",
    )
    autoguidance_scale: float = _field(
        1.0,
        "Run",
        "Scale of autoguidance by an early EMA, saved as the guide; 1: no guide, 1.2 to 1.5 are typical.",
    )
    guide_images: int | None = _field(
        None, "Run", "Number of images after which the EMA is kept as the guide (default: a quarter of the run)."
    )
    resume: Literal["auto", "never"] = _field(
        "auto",
        "Run",
        "Checkpoints already in `output_dir`: auto resumes from the newest, never refuses to start.",
    )
    checkpoint_every_images: int = _field(10_000, "Run", "Interval between checkpoints, in images; 0: never save any.")
    checkpoints_total_limit: int = _field(
        2, "Run", "Number of recent checkpoints to keep, in addition to the one with the best held-out loss."
    )
    time_limit_minutes: float | None = _field(
        None, "Run", "Minutes after which the run saves and stops; the same command resumes it (default: no limit)."
    )
    max_nonfinite_steps: int = _field(
        20, "Run", "Number of consecutive steps with a non-finite gradient before the run stops; each is skipped."
    )
    log_every_images: int = _field(
        1_000, "Run", "Interval between log entries (loss, learning rate, speed, memory), in images."
    )
    report_to: Literal["tensorboard", "trackio", "wandb", "none"] = _field(
        "tensorboard", "Run", "Experiment tracker that receives the log."
    )
    dry_run: bool = _field(
        False,
        "Run",
        "Try everything (data, memory, steps, saving, sampling, the Hub), print the plan, and leave nothing behind.",
    )

    push_to_hub: bool = _field(
        False, "Hub", "Publish the finished pipeline on the Hub; your write access is checked before training."
    )
    hub_model_id: str | None = _field(
        None, "Hub", "Repository to publish to, `user/name` or `name` (default: the name of `output_dir`)."
    )
    hub_private_repo: bool = _field(
        False, "Hub", "Make a new repository private, regardless of the default of your account."
    )
    hub_license: str | None = _field(
        None, "Hub", "License of the model, an identifier of the Hub such as cc-by-nc-sa-4.0."
    )
    hub_dataset_license: str | None = _field(None, "Hub", "License of the training images, stated in the model card.")

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            _check_value(name, getattr(self, name), hint)
        # Neither a shell nor YAML expands the tilde in `--output_dir=~/model`.
        self.output_dir = os.path.expanduser(self.output_dir)
        self.cache_dir = None if self.cache_dir is None else os.path.expanduser(self.cache_dir)
        for name in ("learning_rate", "ema_rampup_ratio", "time_limit_minutes", "adam_epsilon"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be positive and finite, got {value}.")
        for name in ("adam_weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be at least 0 and finite, got {getattr(self, name)}.")
        if not self.snr_gamma >= 0:  # inf is allowed, nan is not
            raise ValueError(f"`snr_gamma` must be at least 0 (or inf), got {self.snr_gamma}.")
        if self.snr_floor and not (0 < self.snr_floor <= self.snr_gamma and self.snr_floor < math.inf):
            raise ValueError(
                f"`snr_floor` must be 0, or at most `snr_gamma` ({self.snr_gamma:g}) and finite, got {self.snr_floor}."
            )
        if self.snr_floor and self.prediction_type == "epsilon":
            raise ValueError(
                f"`snr_floor` ({self.snr_floor}) needs the `prediction_type` v_prediction or sample: the error of the "
                "noise hardly depends on the image at high noise."
            )
        for name in ("adam_beta1", "adam_beta2", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}.")
        for name in ("beta_start", "beta_end", "sample_sigma_min"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"`{name}` must lie in (0, 1), got {getattr(self, name)}.")
        if not 0 <= self.augment_probability <= 1:
            raise ValueError(f"`augment_probability` must lie in [0, 1], got {self.augment_probability}.")
        if self.augment_probability and self.random_flip:
            raise ValueError(
                "`augment_probability` already mirrors images, and tells the network about it, which `random_flip` "
                "does not: leave `random_flip` out."
            )
        if len(self.resolution) not in (1, 2):
            raise ValueError(
                f"`resolution` must be one side or a height and a width in pixels, got {self.resolution}."
            )
        multiple = self.patch_size * 2 ** (len(self.block_out_channels) - 1)
        if any(side % multiple for side in self.resolution):
            raise ValueError(
                f"`resolution` must be a multiple of {multiple} (`patch_size` * 2 ** (number of "
                f"`block_out_channels` - 1)), got {self.resolution}."
            )
        if self.snr_gamma and self.loss_type != "l2":
            raise ValueError(
                f"`loss_type` {self.loss_type!r} cannot be combined with Min-SNR weights: set `snr_gamma` to 0."
            )
        self._check_data()
        if self.early_stopping_patience is not None and not (
            self.num_validation_images and self.validate_every_images and self.checkpoint_every_images
        ):
            raise ValueError(
                "`early_stopping_patience` needs `num_validation_images`, `validate_every_images` and "
                "`checkpoint_every_images` above 0."
            )
        self._check_assessment()
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(f"`condition_dropout` must lie in [0, 1), got {self.condition_dropout}.")
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(f"`guidance_scale` must be at least 0 and finite, got {self.guidance_scale}.")
        if self.guidance_scale != 1 and self.label_column is self.caption_column is None:
            raise ValueError(
                f"`guidance_scale` ({self.guidance_scale}) needs a `label_column` or a `caption_column`. The scale of "
                "a guide is `autoguidance_scale`."
            )
        if self.guidance_scale != 1 and not self.condition_dropout:
            raise ValueError(f"`guidance_scale` ({self.guidance_scale}) needs a `condition_dropout` above 0.")
        if not 1 <= self.autoguidance_scale < math.inf:
            raise ValueError(
                f"`autoguidance_scale` must be at least 1 (no guide) and finite, got {self.autoguidance_scale}."
            )
        if self.guide_images is not None and self.autoguidance_scale == 1:
            raise ValueError(
                f"`guide_images` ({self.guide_images}) needs an `autoguidance_scale` above 1, such as 1.5."
            )
        if self.guide_images is not None and self.guide_images >= self.max_train_images:
            raise ValueError(
                f"`guide_images` ({self.guide_images}) must be below `max_train_images` ({self.max_train_images}): a "
                "guide has to be weaker than the model it guides."
            )
        if self.sample_inference_steps > self.num_train_timesteps:
            raise ValueError(
                f"`sample_inference_steps` ({self.sample_inference_steps}) must not exceed `num_train_timesteps` "
                f"({self.num_train_timesteps})."
            )
        for name in ("hub_model_id", "hub_private_repo", "hub_license", "hub_dataset_license"):
            if getattr(self, name) and not self.push_to_hub:
                raise ValueError(f"`{name}` needs `push_to_hub`.")
        check_license("hub_license", self.hub_license)
        if Path(self.output_dir).exists() and not Path(self.output_dir).is_dir():
            raise ValueError(
                f"`output_dir` must be a folder or a path where one can be made, got the file {self.output_dir!r}."
            )

    def _check_assessment(self) -> None:
        if self.stop_on_copies and not (self.audit_every_images and self.checkpoint_every_images):
            raise ValueError("`stop_on_copies` needs `audit_every_images` and `checkpoint_every_images` above 0.")
        for name, least in LEAST_PICTURES.items():
            if not getattr(self, name):
                continue
            for number in ("num_evaluation_samples", "num_validation_images"):
                if getattr(self, number) < least:
                    raise ValueError(f"`{name}` needs `{number}` of at least {least}, got {getattr(self, number)}.")
        if self.evaluate_every_images and self.in_channels == 4:
            raise ValueError("`evaluate_every_images` needs `in_channels` of 1 or 3, got 4.")
        if self.audit_every_images and (self.in_channels != 3 or self.streaming or self.crop == "random"):
            raise ValueError(
                "`audit_every_images` compares samples with every training image: it needs `in_channels` 3, `crop` "
                "center and no `streaming`."
            )

    def _check_data(self) -> None:
        is_drawn = self.dataset_name is None and self.train_data_dir is None
        if self.dataset_name is not None and self.train_data_dir is not None:
            raise ValueError("Give either `dataset_name` or `train_data_dir`, not both.")
        for name in ("dataset_config_name", "image_column", "validation_split"):
            if is_drawn and getattr(self, name) is not None:
                raise ValueError(f"`{name}` {getattr(self, name)!r} needs a `dataset_name` or a `train_data_dir`.")
        if self.validation_split == self.dataset_split:
            raise ValueError(
                f"`validation_split` {self.validation_split!r} must differ from the training split, `dataset_split`."
            )
        for name in ("text_encoder", "sample_prompts"):
            if getattr(self, name) and self.caption_column is None:
                raise ValueError(f"`{name}` {getattr(self, name)!r} needs a `caption_column`.")
        if self.num_class_embeds is not None and self.label_column is None:
            raise ValueError(f"`num_class_embeds` ({self.num_class_embeds}) needs a `label_column`.")
        if not self.streaming:
            return
        if is_drawn:
            raise ValueError(
                "`streaming` needs a `dataset_name` or a `train_data_dir`: drawn faces cannot be streamed."
            )
        if self.max_train_samples is not None:
            raise ValueError("`max_train_samples` cannot be combined with `streaming`.")
        if self.label_column is not None and self.num_class_embeds is None:
            raise ValueError(
                "`streaming` with a `label_column` needs `num_class_embeds`: a stream's classes cannot be counted."
            )
        if self.num_validation_images and self.validation_split is None:
            raise ValueError(
                "`streaming` cannot set images aside: name a `validation_split`, or set `num_validation_images` to 0."
            )

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return self.resolution[0], self.resolution[-1]

    @property
    def max_train_steps(self) -> int:
        """Number of optimizer steps; the last may slightly exceed `max_train_images`."""
        return math.ceil(self.max_train_images / self.train_batch_size)

    @property
    def guide_after_images(self) -> int | None:
        """Number of images after which the EMA is kept as the guide, or `None` if the run keeps no guide."""
        if self.autoguidance_scale == 1:
            return None
        return math.ceil(self.max_train_images / 4) if self.guide_images is None else self.guide_images

    def learning_rate_at(self, images_seen: int) -> float:
        """Return the learning rate of the step that begins after `images_seen` images."""
        if images_seen < self.lr_warmup_images:
            return self.learning_rate * images_seen / self.lr_warmup_images
        last_image = self.max_train_steps * self.train_batch_size
        done = min((images_seen - self.lr_warmup_images) / max(last_image - self.lr_warmup_images, 1), 1.0)
        course = {"constant": 1.0, "linear": 1.0 - done, "cosine": (1.0 + math.cos(math.pi * done)) / 2}
        return self.learning_rate * course[self.lr_scheduler]

    def ema_decay_at(self, images_seen: int) -> float:
        """Return the decay of the EMA in the step that ends at `images_seen` images, 0 to 1."""
        half_life = min(self.ema_half_life_images, self.ema_rampup_ratio * images_seen)
        return 0.5 ** (self.train_batch_size / half_life) if half_life else 0.0

    def unet_config(self) -> dict:
        """Return the arguments of [`DDPMFacesUNet`]."""
        from ..data.augmentation import AUGMENT_DIM

        config = self._arguments_of("unet")
        height, width = self.image_size
        return {
            **config,
            "mid_block_type": None if self.mid_block_type == "none" else self.mid_block_type,
            "sample_size": height if height == width else (height, width),
            "out_channels": self.in_channels * (2 if self.variance_type == "learned_range" else 1),
            "augment_dim": AUGMENT_DIM if self.augment_probability else None,
            "text_embed_dim": None if self.caption_column is None else self.text_embed_dim,
            "null_class": self.num_class_embeds is not None and self.condition_dropout > 0,
        }

    def scheduler_config(self) -> dict:
        """Return the arguments of [`DDPMFacesScheduler`]. Its solver ends at the noise level of the sample grids."""
        return {**self._arguments_of("scheduler"), "sigma_min": self.sample_sigma_min}

    def _arguments_of(self, what: str) -> dict:
        from ..scheduling_ddpm_faces import DDPMFacesScheduler
        from ..unet_ddpm_faces import DDPMFacesUNet

        cls = {"unet": DDPMFacesUNet, "scheduler": DDPMFacesScheduler}[what]
        ours = asdict(self)
        return {name: ours[name] for name in inspect.signature(cls.__init__).parameters if name in ours}

    def save(self, path: str | Path) -> None:
        """Write all fields to a YAML file that `--config` accepts."""
        import yaml

        Path(path).write_text(yaml.safe_dump(asdict(self), sort_keys=False), "utf-8")


# Integers must be at least 1, except for these, where 0 has a meaning.
_MAY_BE_ZERO = (
    "seed",
    "lr_warmup_images",
    "dataloader_num_workers",
    "num_validation_images",
    "validate_every_images",
    "checkpoint_every_images",
    "sample_every_images",
    "evaluate_every_images",
    "audit_every_images",
)


_MAX_LENGTH = 2**53  # length of a run in images; floats are exact up to here


def _check_value(name: str, value, hint) -> None:
    if not is_a(value, hint):
        raise ValueError(f"`{name}` must be {_in_words(hint)}, got {value!r}.")
    if isinstance(value, str) and not value.strip():
        raise ValueError(f"`{name}` must not be blank, got {value!r}.")
    if value is not None and int in (hint, *get_args(hint)):
        minimum = 0 if name in _MAY_BE_ZERO else 1
        maximum = _MAX_LENGTH if name.endswith(("_images", "_pixels")) and not name.startswith("num_") else MAX_INTEGER
        items = value if isinstance(value, list) else [value]
        if any(item < minimum for item in items):
            raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")
        if any(item > maximum for item in items):
            raise ValueError(f"`{name}` must be at most {maximum}, got {value}.")


def is_a(value, hint) -> bool:
    """Whether a value has the type of its field. A float field accepts an `int`, but no number field a `bool`."""
    if get_origin(hint) in (Union, UnionType):
        return any(is_a(value, part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(is_a(item, *get_args(hint)) for item in value)
    return type(value) in ((float, int) if hint is float else (hint,))


def _in_words(hint) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_in_words, get_args(hint)))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if hint is NoneType:
        return "None"
    return hint.__name__ if inspect.isclass(hint) else str(hint)
