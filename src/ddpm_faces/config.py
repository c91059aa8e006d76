"""The configuration of a training run: one dataclass, from which the command line and the YAML files come."""

import argparse
import difflib
import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal


def _field(default, help: str):
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(metadata={"help": help}, **factory)


@dataclass
class TrainingConfig:
    """All that decides a training run. Lengths are in images, so that they do not depend on the batch size.

    The defaults draw their own faces and train in a few minutes on two CPU cores.

    Raises:
        ValueError: A value that cannot work, with the field and what is allowed.
    """

    # Data
    dataset_name: str | None = _field(None, "Data set on the Hub, or a local data set folder.")
    dataset_config_name: str | None = _field(None, "Configuration of the data set.")
    dataset_split: str = _field("train", "Split of the data set.")
    image_column: str | None = _field(None, "Column of the pictures (default: the first that holds any).")
    train_data_dir: str | None = _field(None, "Local folder of pictures, in place of `dataset_name`.")
    cache_dir: str | None = _field(None, "Where data sets from the Hub are kept.")
    max_train_samples: int | None = _field(None, "Use only the first so many pictures.")
    num_drawn_images: int = _field(4096, "Faces to draw where no data set is named.")
    resolution: int = _field(32, "Side of the pictures in pixels; they are cropped about their centre.")
    random_flip: bool = _field(False, "Mirror each picture with probability one half.")

    # Network: the arguments of DDPMFacesUNet
    in_channels: int = _field(3, "Channels of the pictures: 1 (grey), 3 (RGB) or 4 (RGBA).")
    block_out_channels: list[int] = _field([32, 64, 128], "Width of each level.")
    block_types: list[str] = _field(["resnet", "resnet"], "Between the levels: conv, resnet or resnet_attn.")
    mid_block_type: str = _field("resnet_attn", "At the last level: resnet, resnet_attn or none.")
    out_block_type: str = _field("norm_conv", "At the end: conv or norm_conv.")
    layers_per_block: int = _field(1, "Residual layers in each resnet block.")
    time_proj_dim: int = _field(32, "Length of the sinusoidal embedding of the timestep.")
    time_embedding_dim: int = _field(128, "Width of the embedding that the blocks are given.")
    time_embedding_layers: int = _field(2, "Linear layers between the two.")
    act_fn: str = _field("silu", "Activation of the time embedding: relu or silu.")
    norm_num_groups: int = _field(8, "Groups of each GroupNorm.")
    attention_head_dim: int = _field(64, "Channels of an attention head.")
    dropout: float = _field(0.0, "Probability of dropout in residual layers.")
    gradient_checkpointing: bool = _field(False, "Save memory by computing activations twice.")

    # Diffusion: the arguments of DDPMFacesScheduler, and the loss
    num_train_timesteps: int = _field(300, "T, the length of the diffusion.")
    beta_start: float = _field(1e-4, "First beta.")
    beta_end: float = _field(0.02, "Last beta.")
    beta_schedule: str = _field("squaredcos_cap_v2", "linear, scaled_linear, squaredcos_cap_v2 or sigmoid.")
    variance_type: str = _field("fixed_small", "Variance of a sampling step: fixed_small or fixed_large.")
    clip_sample: bool = _field(True, "Clamp the predicted picture to the data range when sampling.")
    prediction_type: str = _field("v_prediction", "What the network predicts: epsilon, sample or v_prediction.")
    timestep_spacing: str = _field("leading", "Timesteps of a shorter sampling: leading, trailing or linspace.")
    rescale_betas_zero_snr: bool = _field(False, "Rescale the betas so that the last timestep is pure noise.")
    loss_type: Literal["l2", "l1", "huber"] = _field("l2", "Distance between prediction and target.")
    snr_gamma: float = _field(
        float("inf"), "Min-SNR weights with this gamma; inf: the error of the noise; 0: of what is predicted."
    )

    # Optimisation
    seed: int = _field(0, "Of the weights, the order of the pictures, the noise, and the sample grids.")
    train_batch_size: int = _field(32, "Pictures per process and forward pass.")
    gradient_accumulation_steps: int = _field(1, "Forward passes per optimizer step.")
    max_train_images: int = _field(40_000, "Length of the run.")
    learning_rate: float = _field(1e-3, "Highest learning rate.")
    lr_scheduler: Literal["constant", "linear", "cosine"] = _field("cosine", "Course of the learning rate.")
    lr_warmup_images: int = _field(2_000, "Images over which it rises from 0.")
    adam_beta1: float = _field(0.9, "AdamW's decay of the mean of the gradient.")
    adam_beta2: float = _field(0.999, "AdamW's decay of the mean of its square.")
    adam_weight_decay: float = _field(0.0, "AdamW's weight decay; at 0 it is Adam.")
    adam_epsilon: float = _field(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = _field(1.0, "Clip the gradient to this norm; 0: do not.")
    use_ema: bool = _field(True, "Keep an exponential moving average of the weights, sample from it and save it.")
    ema_half_life_images: int = _field(4_000, "Images after which a weight counts for half in the average.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _field(
        None, "Precision of the network (default: what `accelerate launch` says). All else is float32."
    )
    dataloader_num_workers: int = _field(0, "Processes that fetch batches; the pictures lie decoded in memory.")

    # Output
    output_dir: str = _field("ddpm-faces-model", "Folder of checkpoints, pictures and the finished pipeline.")
    resume: str = _field("auto", "auto: go on from the newest checkpoint in `output_dir`, if any; never: start anew.")
    checkpoint_every_images: int = _field(10_000, "Save a checkpoint every so many images; 0: never.")
    checkpoints_total_limit: int = _field(2, "Checkpoints to keep.")
    log_every_images: int = _field(1_000, "Log loss, learning rate and speed every so many images.")
    sample_every_images: int = _field(10_000, "Draw a grid of samples every so many images; 0: only at the end.")
    num_samples: int = _field(16, "Pictures in a grid.")
    sample_inference_steps: int = _field(50, "Denoising steps of the grids on the way; the last grid takes all T.")
    report_to: Literal["tensorboard", "none"] = _field("tensorboard", "Tracker of the log.")

    def __post_init__(self) -> None:
        least = dict.fromkeys(_POSITIVE, 1) | dict.fromkeys(_NOT_NEGATIVE, 0)
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")
        if not self.learning_rate > 0:
            raise ValueError(f"`learning_rate` must be positive, got {self.learning_rate}.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}.")
        if self.snr_gamma and self.loss_type != "l2":
            raise ValueError(f"`loss_type` {self.loss_type!r} takes no Min-SNR weights: set `snr_gamma` to 0.")
        if self.resume not in ("auto", "never"):
            raise ValueError(f"`resume` must be 'auto' or 'never', got {self.resume!r}.")
        if self.dataset_name is not None and self.train_data_dir is not None:
            raise ValueError("Give either `dataset_name` or `train_data_dir`, not both.")
        if self.sample_inference_steps > self.num_train_timesteps:
            raise ValueError(
                f"`sample_inference_steps` ({self.sample_inference_steps}) must not exceed `num_train_timesteps` "
                f"({self.num_train_timesteps})."
            )
        if not self.output_dir.strip() or (Path(self.output_dir).exists() and not Path(self.output_dir).is_dir()):
            raise ValueError(f"`output_dir` must be a folder, or the name of a new one, got {self.output_dir!r}.")

    def unet_config(self) -> dict:
        """The arguments of [`DDPMFacesUNet`]."""
        config = self._arguments_of("unet")
        config["mid_block_type"] = None if self.mid_block_type == "none" else self.mid_block_type
        return {**config, "sample_size": self.resolution, "out_channels": self.in_channels}

    def scheduler_config(self) -> dict:
        """The arguments of [`DDPMFacesScheduler`]."""
        return self._arguments_of("scheduler")

    def _arguments_of(self, what: str) -> dict:
        from .scheduling_ddpm_faces import DDPMFacesScheduler
        from .unet_ddpm_faces import DDPMFacesUNet

        cls = {"unet": DDPMFacesUNet, "scheduler": DDPMFacesScheduler}[what]
        ours = asdict(self)
        return {name: ours[name] for name in inspect.signature(cls.__init__).parameters if name in ours}

    def save(self, path: str | Path) -> None:
        """Write all fields to a YAML file that `--config` takes."""
        import yaml

        Path(path).write_text(yaml.safe_dump(asdict(self), sort_keys=False))


_POSITIVE = (
    "max_train_samples",
    "num_drawn_images",
    "resolution",
    "train_batch_size",
    "gradient_accumulation_steps",
    "max_train_images",
    "ema_half_life_images",
    "checkpoints_total_limit",
    "log_every_images",
    "num_samples",
    "sample_inference_steps",
)
_NOT_NEGATIVE = (
    "seed",
    "lr_warmup_images",
    "adam_weight_decay",
    "snr_gamma",
    "max_grad_norm",
    "dataloader_num_workers",
    "checkpoint_every_images",
    "sample_every_images",
)


def parse_training_config(argv: Sequence[str] | None = None) -> TrainingConfig:
    """Read the configuration: defaults, then the file of `--config`, then the other flags.

    Args:
        argv (`Sequence[str]`, *optional*): The arguments; by default those of the command line.

    Raises:
        SystemExit: With a message, for an unknown flag or key, or a value that cannot work.
    """
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        TrainingConfig,
        description="Train DDPM on pictures of faces. With no arguments: small faces that the program draws itself.",
        usage="accelerate launch training/train.py [--config FILE] [--FIELD VALUE ...]",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file of fields; flags on the command line take precedence.")
    file_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    file_parser.add_argument("--config")
    file_args, flags = file_parser.parse_known_args(argv)
    try:
        if file_args.config is not None:
            # As flags, so that a file is read by the same rules as the command line.
            flags = [*_flags_of_yaml(Path(file_args.config)), *flags]
        config, *_, unknown = parser.parse_args_into_dataclasses(flags, return_remaining_strings=True)
        if unknown:
            raise ValueError(_unknown("argument", unknown[0], prefix="--"))
        return config
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


def _flags_of_yaml(path: Path) -> list[str]:
    import yaml

    if not path.is_file():
        raise ValueError(f"`--config` must be an existing file, got {str(path)!r}.")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `field: value` lines, got a {type(values).__name__}.")
    defaults = {f.name: f.default for f in fields(TrainingConfig)}
    flags = []
    for key, value in values.items():
        if key not in defaults:
            raise ValueError(f"{path}: {_unknown('field', str(key))}")
        if value is None:
            if defaults[key] is not None:
                raise ValueError(f"{path}: `{key}` must have a value.")
            continue
        items = value if isinstance(value, list) else [value]
        if not items or any(isinstance(item, (list, dict)) for item in items):
            raise ValueError(f"{path}: `{key}` must be a value or a list of values, got {value!r}.")
        flags += [f"--{key}", *(str(item) for item in items)]
    return flags


def _unknown(what: str, name: str, prefix: str = "") -> str:
    names = [f.name for f in fields(TrainingConfig)]
    nearest = difflib.get_close_matches(name.removeprefix(prefix).split("=")[0], names, n=1)
    suggestion = f"; did you mean {prefix}{nearest[0]}?" if nearest else "; see --help for those there are."
    return f"unknown {what} {name}{suggestion}"
