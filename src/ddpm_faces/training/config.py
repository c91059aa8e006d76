"""The configuration of a training run: one dataclass, of which `arguments` makes the command line."""

import inspect
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

from ..hub.card import check_license


# The groups of `--help`, in its order, and what stands under their names there.
GROUPS = {
    "Data": "where the pictures come from, and what is done to them",
    "Network": "the arguments of DDPMFacesUNet",
    "Diffusion": "the arguments of DDPMFacesScheduler, and the loss",
    "Optimisation": "lengths are in images, so that they mean the same at every batch size and on any hardware",
    "Validation": "what is measured and drawn on the way, without touching the training",
    "Run": "where it goes, how it is saved, how it ends",
    "Hub": "whether and how it is published when it is finished",
}


# Of samples and of held-out pictures, that measuring and searching take.
LEAST_PICTURES = {"evaluate_every_images": 20, "audit_every_images": 100}


def _field(default, group: str, help: str):
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(metadata={"help": help, "group": group}, **factory)


@dataclass
class TrainingConfig:
    """All that decides a training run. Lengths are in images, so that they do not depend on the hardware.

    The defaults draw their own faces and train in a few minutes on two CPU cores.

    Raises:
        ValueError: A value that cannot work, with the field and what is allowed.
    """

    dataset_name: str | None = _field(
        None, "Data", "Dataset on the Hub, or a local folder of one (default: drawn faces)."
    )
    dataset_config_name: str | None = _field(None, "Data", "Configuration of the dataset (default: its own).")
    dataset_split: str = _field("train", "Data", "Split of the dataset to train on.")
    train_data_dir: str | None = _field(None, "Data", "Local folder of images, instead of `dataset_name`.")
    image_column: str | None = _field(None, "Data", "Column of the images (default: the first that holds any).")
    label_column: str | None = _field(
        None, "Data", "Column of the classes; `folder` takes the names of the subfolders (default: no classes)."
    )
    streaming: bool = _field(
        False, "Data", "Read the dataset while training instead of caching it, for one that is too large for the disk."
    )
    shuffle_block_size: int = _field(1024, "Data", "Pictures that are shuffled together when streaming.")
    cache_dir: str | None = _field(
        None, "Data", "Where decoded pictures and data sets from the Hub are kept (default: beside the Hub's cache)."
    )
    skip_unreadable: bool = _field(False, "Data", "Leave pictures that cannot be read out, and list them.")
    max_image_pixels: int = _field(2**29, "Data", "Refuse images of more pixels than this, which take much memory.")
    max_train_samples: int | None = _field(None, "Data", "Use only the first so many pictures (default: all).")
    num_drawn_images: int = _field(4096, "Data", "Faces to draw where no data set is named.")
    resolution: list[int] = _field([32], "Data", "Side of the pictures in pixels, or height and width.")
    crop: Literal["center", "random"] = _field(
        "center", "Data", "Which part of a picture of another shape: its centre, or each time a random one."
    )
    random_flip: bool = _field(False, "Data", "Mirror each picture with probability one half.")
    augment_probability: float = _field(
        0.0,
        "Data",
        "Probability of each of EDM's augmentations, of which the network is told; EDM takes 0.15 for faces.",
    )
    dataloader_num_workers: int = _field(
        0, "Data", "Processes that fetch batches; needed for streaming, and where the pictures do not fit in memory."
    )

    pretrained_model_name_or_path: str | None = _field(
        None, "Network", "Pipeline to start from, a folder or on the Hub: its network, its noise schedule."
    )
    in_channels: Literal[1, 3, 4] = _field(3, "Network", "Channels of the pictures: grey, RGB or RGBA.")
    block_out_channels: list[int] = _field([32, 64, 128], "Network", "Width of each level.")
    block_types: list[str] = _field(
        ["resnet", "resnet"], "Network", "Between the levels: conv, resnet or resnet_attn."
    )
    mid_block_type: Literal["resnet", "resnet_attn", "none"] = _field("resnet_attn", "Network", "At the last level.")
    out_block_type: Literal["conv", "norm_conv"] = _field("norm_conv", "Network", "At the end.")
    layers_per_block: int = _field(1, "Network", "Residual layers in each resnet block.")
    time_proj_dim: int = _field(32, "Network", "Length of the sinusoidal embedding of the timestep.")
    time_embedding_dim: int = _field(128, "Network", "Width of the embedding that the blocks are given.")
    time_embedding_layers: int = _field(2, "Network", "Linear layers between the two.")
    act_fn: Literal["relu", "silu"] = _field("silu", "Network", "Activation of the time embedding.")
    norm_num_groups: int = _field(8, "Network", "Groups of each GroupNorm.")
    attention_head_dim: int = _field(64, "Network", "Channels of an attention head.")
    dropout: float = _field(0.0, "Network", "Probability of dropout in residual layers.")
    num_class_embeds: int | None = _field(
        None, "Network", "Number of classes (default: as many as `label_column` has)."
    )
    gradient_checkpointing: bool = _field(False, "Network", "Save memory by computing activations twice.")

    num_train_timesteps: int = _field(300, "Diffusion", "T, the length of the diffusion.")
    beta_start: float = _field(1e-4, "Diffusion", "First beta.")
    beta_end: float = _field(0.02, "Diffusion", "Last beta.")
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = _field(
        "squaredcos_cap_v2",
        "Diffusion",
        "Course of the betas from the first to the last; squaredcos_cap_v2 has its own.",
    )
    variance_type: Literal["fixed_small", "fixed_large", "learned_range"] = _field(
        "fixed_small", "Diffusion", "Variance of a sampling step; learned_range: the network learns it too."
    )
    clip_sample: bool = _field(True, "Diffusion", "Clamp the predicted picture to the data range when sampling.")
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = _field(
        "v_prediction", "Diffusion", "What the network predicts."
    )
    timestep_spacing: Literal["leading", "trailing", "linspace"] = _field(
        "leading", "Diffusion", "Timesteps of a shorter sampling."
    )
    rescale_betas_zero_snr: bool = _field(
        False, "Diffusion", "Rescale the betas so that the last timestep is pure noise."
    )
    low_discrepancy_timesteps: bool = _field(
        False, "Diffusion", "Spread the timesteps of pictures that follow one another evenly: less noise of gradients."
    )
    loss_type: Literal["l2", "l1", "huber"] = _field("l2", "Diffusion", "Distance between prediction and target.")
    snr_gamma: float = _field(
        float("inf"),
        "Diffusion",
        "Min-SNR weights with this gamma; inf: the error of the noise; 0: of what is predicted.",
    )

    seed: int = _field(
        0, "Optimisation", "Of the weights, the order of the pictures, the noise, and the sample grids."
    )
    train_batch_size: int = _field(
        32, "Optimisation", "Pictures of an optimizer step, over all processes; each takes an equal share."
    )
    device_batch_size: int | None = _field(
        None,
        "Optimisation",
        "Largest micro-batch; a larger share is accumulated (default: no accumulation).",
    )
    max_train_images: int = _field(40_000, "Optimisation", "Length of the run.")
    learning_rate: float = _field(1e-3, "Optimisation", "Highest learning rate.")
    lr_scheduler: Literal["constant", "linear", "cosine"] = _field(
        "cosine", "Optimisation", "Course of the learning rate after the warm-up; linear and cosine end at 0."
    )
    lr_warmup_images: int = _field(2_000, "Optimisation", "Images over which it rises from 0.")
    adam_beta1: float = _field(0.9, "Optimisation", "AdamW's decay of the mean of the gradient.")
    adam_beta2: float = _field(0.999, "Optimisation", "AdamW's decay of the mean of its square.")
    adam_weight_decay: float = _field(0.0, "Optimisation", "AdamW's weight decay; at 0 it is Adam.")
    adam_epsilon: float = _field(1e-8, "Optimisation", "AdamW's epsilon.")
    max_grad_norm: float = _field(1.0, "Optimisation", "Clip the gradient to this norm; 0: do not.")
    use_ema: bool = _field(True, "Optimisation", "Keep an EMA of the weights, sample from it and save it.")
    ema_half_life_images: int = _field(4_000, "Optimisation", "Half-life of the EMA.")
    ema_rampup_ratio: float = _field(
        0.1,
        "Optimisation",
        "Largest half-life of the EMA, as a share of the images seen; keeps an early EMA young.",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _field(
        None,
        "Optimisation",
        "Precision of the network (default: what `accelerate launch` says). All else is float32.",
    )

    validation_split: str | None = _field(
        None, "Validation", "Split of the held-out pictures (default: some of `dataset_split` are set aside)."
    )
    num_validation_images: int = _field(64, "Validation", "Held-out pictures; 0: no held-out loss.")
    validate_every_images: int = _field(
        10_000, "Validation", "Measure the held-out loss every so many images; 0: only at the end."
    )
    early_stopping_patience: int | None = _field(
        None,
        "Validation",
        "End after so many validations without a better loss, with the best weights (default: never).",
    )
    sample_every_images: int = _field(
        10_000, "Validation", "Draw a grid of samples every so many images; 0: only at the end."
    )
    num_samples: int = _field(16, "Validation", "Pictures in a grid.")
    sample_inference_steps: int = _field(
        20, "Validation", "Steps of DPM-Solver++ for the grids on the way; the last grid takes all T of DDPM."
    )
    sample_sigma_min: float = _field(
        0.02,
        "Validation",
        "Noise to picture at the last of these steps; 0.1 makes cleaner pictures of a short training.",
    )

    evaluate_every_images: int = _field(
        0,
        "Validation",
        "Measure samples beside the held-out pictures every so many images, as `ddpm-faces evaluate`; 0: never.",
    )
    audit_every_images: int = _field(
        0, "Validation", "Search samples for copies of training pictures every so many images; 0: never."
    )
    stop_on_copies: bool = _field(
        False, "Validation", "End when copies are found, with the weights of the last audit that found none."
    )
    num_evaluation_samples: int = _field(200, "Validation", "Samples that are measured and searched.")

    output_dir: str = _field("ddpm-faces-model", "Run", "Folder of checkpoints, pictures and the finished pipeline.")
    guidance_scale: float = _field(
        1.0,
        "Run",
        "Save an early EMA as the guide (autoguidance); 1: no guide, 1.2 to 1.5 is strong.",
    )
    guide_images: int | None = _field(
        None, "Run", "Images after which the EMA is kept as the guide (default: a quarter of the run)."
    )
    resume: Literal["auto", "never"] = _field(
        "auto", "Run", "auto: go on from the newest checkpoint in `output_dir`, if any; never: refuse to."
    )
    checkpoint_every_images: int = _field(10_000, "Run", "Save a checkpoint every so many images; 0: never.")
    checkpoints_total_limit: int = _field(
        2, "Run", "Newest checkpoints to keep; that of the best held-out loss is kept beside them."
    )
    time_limit_minutes: float | None = _field(
        None, "Run", "Save and stop before the process is this old; the same command goes on (default: no limit)."
    )
    max_nonfinite_steps: int = _field(
        20, "Run", "Stop after so many steps in a row whose gradient is not finite; each is skipped and logged."
    )
    log_every_images: int = _field(1_000, "Run", "Log loss, learning rate, speed and memory every so many images.")
    report_to: Literal["tensorboard", "trackio", "wandb", "none"] = _field("tensorboard", "Run", "Tracker of the log.")
    dry_run: bool = _field(
        False,
        "Run",
        "Check it all (data, memory, a step, a save, a sample, the Hub), print the plan, leave nothing behind.",
    )

    push_to_hub: bool = _field(
        False, "Hub", "Publish the finished pipeline; that the Hub lets you is checked before training."
    )
    hub_model_id: str | None = _field(
        None, "Hub", "Repository, as `user/name` or `name` (default: the name of `output_dir`)."
    )
    hub_private_repo: bool = _field(False, "Hub", "Make a new repository private, whatever your account says.")
    hub_license: str | None = _field(None, "Hub", "Licence of the model, such as cc-by-nc-sa-4.0.")
    hub_dataset_license: str | None = _field(None, "Hub", "Licence of the pictures, for the card.")

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            _check_value(name, getattr(self, name), hint)
        # Shells leave `--output_dir=~/model` as it is, and so does YAML.
        self.output_dir = os.path.expanduser(self.output_dir)
        self.cache_dir = None if self.cache_dir is None else os.path.expanduser(self.cache_dir)
        if self.seed >= 2**31:  # NumPy takes no more than 32 bits
            raise ValueError(f"`seed` must be below 2**31, got {self.seed}.")
        for name in ("learning_rate", "ema_rampup_ratio", "time_limit_minutes", "adam_epsilon"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be positive and finite, got {value}.")
        for name in ("adam_weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be at least 0 and finite, got {getattr(self, name)}.")
        if not self.snr_gamma >= 0:  # inf has a meaning, nan has none
            raise ValueError(f"`snr_gamma` must be at least 0 (or inf), got {self.snr_gamma}.")
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
                "`random_flip` mirrors pictures without telling the network, and `augment_probability` mirrors them "
                "and tells it: leave `random_flip` out."
            )
        if len(self.resolution) not in (1, 2):
            raise ValueError(f"`resolution` must be a side or a height and a width in pixels, got {self.resolution}.")
        multiple = 2 ** (len(self.block_out_channels) - 1)
        if any(side % multiple for side in self.resolution):
            raise ValueError(
                f"`resolution` must be a multiple of {multiple} (2 ** (number of `block_out_channels` - 1)), got "
                f"{self.resolution}."
            )
        if self.snr_gamma and self.loss_type != "l2":
            raise ValueError(f"`loss_type` {self.loss_type!r} takes no Min-SNR weights: set `snr_gamma` to 0.")
        self._check_data()
        if self.early_stopping_patience is not None and not (
            self.num_validation_images and self.validate_every_images and self.checkpoint_every_images
        ):
            raise ValueError(
                "`early_stopping_patience` needs `num_validation_images`, `validate_every_images` and "
                "`checkpoint_every_images` above 0."
            )
        self._check_assessment()
        if not 1 <= self.guidance_scale < math.inf:
            raise ValueError(f"`guidance_scale` must be at least 1 (no guide) and finite, got {self.guidance_scale}.")
        if self.guide_images is not None and self.guidance_scale == 1:
            raise ValueError(f"`guide_images` ({self.guide_images}) needs a `guidance_scale` above 1: 1.5, say.")
        if self.guide_images is not None and self.guide_images >= self.max_train_images:
            raise ValueError(
                f"`guide_images` ({self.guide_images}) must be below `max_train_images` ({self.max_train_images}): a "
                "guide is weaker than what it guides."
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
            raise ValueError(f"`output_dir` must be a folder, or the name of a new one, got {self.output_dir!r}.")

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
            raise ValueError("`evaluate_every_images` measures pictures of 1 or 3 `in_channels`, got 4.")
        if self.audit_every_images and (self.in_channels != 3 or self.streaming or self.crop == "random"):
            raise ValueError(
                "`audit_every_images` looks at all training pictures: it needs 3 `in_channels`, `crop` center and no "
                "`streaming`."
            )

    def _check_data(self) -> None:
        is_drawn = self.dataset_name is None and self.train_data_dir is None
        if self.dataset_name is not None and self.train_data_dir is not None:
            raise ValueError("Give either `dataset_name` or `train_data_dir`, not both.")
        for name in ("dataset_config_name", "image_column", "validation_split"):
            if is_drawn and getattr(self, name) is not None:
                raise ValueError(f"`{name}` {getattr(self, name)!r} needs a data set: drawn faces have none.")
        if self.validation_split == self.dataset_split:
            raise ValueError(f"`validation_split` {self.validation_split!r} is what is trained on, `dataset_split`.")
        if self.num_class_embeds is not None and self.label_column is None:
            raise ValueError(f"`num_class_embeds` ({self.num_class_embeds}) needs a `label_column`.")
        if not self.streaming:
            return
        if is_drawn:
            raise ValueError(
                "`streaming` needs a `dataset_name` or a `train_data_dir`: drawn faces are made, not read."
            )
        if self.max_train_samples is not None:
            raise ValueError("`max_train_samples` is not for `streaming`, which knows no first pictures.")
        if self.label_column is not None and self.num_class_embeds is None:
            raise ValueError("`streaming` with a `label_column` needs `num_class_embeds`: a stream cannot be counted.")
        if self.num_validation_images and self.validation_split is None:
            raise ValueError(
                "`streaming` sets no pictures aside: name a `validation_split`, or set `num_validation_images` to 0."
            )

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the pictures in pixels"""
        return self.resolution[0], self.resolution[-1]

    @property
    def max_train_steps(self) -> int:
        """Optimizer steps of the run; the last may take it a little beyond `max_train_images`."""
        return math.ceil(self.max_train_images / self.train_batch_size)

    @property
    def guide_after_images(self) -> int | None:
        """After how many images the weights are kept as a guide, if there is to be one."""
        if self.guidance_scale == 1:
            return None
        return math.ceil(self.max_train_images / 4) if self.guide_images is None else self.guide_images

    def learning_rate_at(self, images_seen: int) -> float:
        """The learning rate of a step that begins after `images_seen` images."""
        if images_seen < self.lr_warmup_images:
            return self.learning_rate * images_seen / self.lr_warmup_images
        last_image = self.max_train_steps * self.train_batch_size
        done = min((images_seen - self.lr_warmup_images) / max(last_image - self.lr_warmup_images, 1), 1.0)
        course = {"constant": 1.0, "linear": 1.0 - done, "cosine": (1.0 + math.cos(math.pi * done)) / 2}
        return self.learning_rate * course[self.lr_scheduler]

    def ema_decay_at(self, images_seen: int) -> float:
        """How much of the EMA stays, in the step that ends at `images_seen` images."""
        half_life = min(self.ema_half_life_images, self.ema_rampup_ratio * images_seen)
        return 0.5 ** (self.train_batch_size / half_life) if half_life else 0.0

    def unet_config(self) -> dict:
        """The arguments of [`DDPMFacesUNet`]."""
        from ..data.augmentation import AUGMENT_DIM

        config = self._arguments_of("unet")
        height, width = self.image_size
        return {
            **config,
            "mid_block_type": None if self.mid_block_type == "none" else self.mid_block_type,
            "sample_size": height if height == width else (height, width),
            "out_channels": self.in_channels * (2 if self.variance_type == "learned_range" else 1),
            "augment_dim": AUGMENT_DIM if self.augment_probability else None,
        }

    def scheduler_config(self) -> dict:
        """The arguments of [`DDPMFacesScheduler`]."""
        return self._arguments_of("scheduler")

    def _arguments_of(self, what: str) -> dict:
        from ..scheduling_ddpm_faces import DDPMFacesScheduler
        from ..unet_ddpm_faces import DDPMFacesUNet

        cls = {"unet": DDPMFacesUNet, "scheduler": DDPMFacesScheduler}[what]
        ours = asdict(self)
        return {name: ours[name] for name in inspect.signature(cls.__init__).parameters if name in ours}

    def save(self, path: str | Path) -> None:
        """Write all fields to a YAML file that `--config` takes."""
        import yaml

        Path(path).write_text(yaml.safe_dump(asdict(self), sort_keys=False), "utf-8")


# Whole numbers are at least 1, but for these, whose 0 means something.
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


def _check_value(name: str, value, hint) -> None:
    if not is_a(value, hint):
        raise ValueError(f"`{name}` must be {_in_words(hint)}, got {value!r}.")
    if isinstance(value, str) and not value.strip():
        raise ValueError(f"`{name}` must not be blank, got {value!r}.")
    if value is not None and int in (hint, *get_args(hint)):
        minimum = 0 if name in _MAY_BE_ZERO else 1
        if any(item < minimum for item in (value if isinstance(value, list) else [value])):
            raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")


def is_a(value, hint) -> bool:
    """Whether a value is of the type of its field. A whole number will do for a float, but True is no number."""
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
