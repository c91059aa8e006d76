# Copyright 2026 The ddpm-faces authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Sampling: predict the noise, take a step, repeat (Algorithm 2 of DDPM, https://huggingface.co/papers/2006.11239)."""

import copy
import importlib
import inspect
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor


logger = logging.get_logger(__name__)

# Schedulers that use a predicted variance. All others receive only the prediction.
VARIANCE_SCHEDULERS = {"DDPMFacesScheduler", "DDPMScheduler", "DDPMParallelScheduler"}
# Schedulers that cannot sample with zero-SNR betas (tested with diffusers 0.42): they fail midway or return wrong
# images.
NOT_FOR_ZERO_SNR = (
    "PNDMScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "DEISMultistepScheduler",
    "DPMSolverSinglestepScheduler",
)
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MAX_CPU_PIXELS = 2**16  # of a micro-batch: 16 images of 64x64

# The code files of a saved folder, in diffusers' layout for custom components: each class has its own file beside its
# configuration. Every published model_index.json refers to these names, so they never change.
CODE_FILES = {
    "DDPMFacesPipeline": "pipeline_ddpm_faces",
    "DDPMFacesUNet": "unet_ddpm_faces",
    "DDPMFacesScheduler": "scheduling_ddpm_faces",
}
# Files beside this one that a saved folder also has: `custom_pipeline="restoration_ddpm_faces"` loads them.
COMPANION_FILES = ("restoration_ddpm_faces.py", "editing_ddpm_faces.py", "operators_ddpm_faces.py")
# The settings of a pipeline, which `model_index.json` holds beside the components.
SETTINGS = (
    "weights",
    "guidance_scale",
    "autoguidance_scale",
    "guidance_interval",
    "presets",
    "default_preset",
)
# Upper bounds for the configurations of diffusers' components, which diffusers does not check: an untrusted file must
# not exhaust the memory. The components of this package check their own configurations.
MAX_NUMBER = {
    **dict.fromkeys(("unet", "guide", "student"), 16_384),
    **dict.fromkeys(("scheduler", "text_encoder"), 1_000_000),
}
MAX_LAYERS_PER_BLOCK, MAX_BLOCKS, MAX_PRESETS = 64, 12, 32
MODEL_COMPONENTS = ("unet", "guide", "student")
TEXT_COMPONENTS = ("tokenizer", "text_encoder")
MAX_PROMPT_TOKENS = 77
# Format of a saved folder. Formats with a higher number are refused. Format 2 added the guide, format 3 presets, the
# student and the guidance interval. Format 4 added the text encoder, and classifier-free guidance with the name
# `guidance_scale`, which was the scale of autoguidance before.
FORMAT_VERSION = 4

# The settings of a preset: arguments of the call, and arguments of `DDPMFacesScheduler` in place of the model's.
PRESET_CALL_SETTINGS = (
    "num_inference_steps",
    "guidance_scale",
    "autoguidance_scale",
    "guidance_interval",
    "network",
)
PRESET_SCHEDULER_SETTINGS = (
    "algorithm",
    "timestep_spacing",
    "solver_order",
    "sigma_min",
    "epsilon_scaling",
    "clip_sample",
    "tuned_steps",
)
# The preset that every model has: all T steps of DDPM, as in the article.
EXACT = "exact"
# Solver for a number of steps below T, where no preset of the model says otherwise.
SOLVER = {"algorithm": "dpmsolver++", "timestep_spacing": "logsnr"}


class Guidance(NamedTuple):
    """The guidance settings of a call.

    Both scales may act at once. With the prediction D of the network for the condition, D_0 without a condition and
    D_g of the guide, the guided prediction is

        D + (guidance_scale - 1) (D - D_0) + (autoguidance_scale - 1) (D - D_g)

    Args:
        guidance_scale (`float`, defaults to 1.0):
            Scale of classifier-free guidance (https://huggingface.co/papers/2207.12598); 1 is off.
        autoguidance_scale (`float`, defaults to 1.0): Scale of autoguidance, see [`set_guide`]; 1 is off.
        guidance_interval (`Sequence[int]`, *optional*):
            Lowest and highest timestep with guidance (https://huggingface.co/papers/2404.07724); by default all.
    """

    guidance_scale: float = 1.0
    autoguidance_scale: float = 1.0
    guidance_interval: Sequence[int] | None = None


UNGUIDED = Guidance()


class Text(NamedTuple):
    """The texts of a batch, for the network.

    Args:
        embeds (`torch.Tensor` of shape `(batch, text_embed_dim)`): Their embeddings.
        is_given (`torch.Tensor` of shape `(batch,)`, `torch.bool`): `False` for images without a text.
    """

    embeds: torch.Tensor
    is_given: torch.Tensor

    def part(self, part: slice) -> "Text":
        """Return the texts of some images of the batch."""
        return Text(self.embeds[part], self.is_given[part])

    def for_network(self, network: ModelMixin) -> torch.Tensor:
        """Return the embeddings, with that of no text where there is none."""
        return torch.where(self.is_given[:, None], self.embeds, network.null_text_embed.to(self.embeds.dtype))


class Condition(NamedTuple):
    """The class labels and texts of a batch.

    Args:
        class_labels (`torch.Tensor` of shape `(batch,)`, *optional*): Class of each image.
        text ([`Text`], *optional*): Text of each image.
        negative ([`Text`], *optional*): What guidance leads away from, instead of the prediction without a text.
        negative_class_labels (`torch.Tensor` of shape `(batch,)`, *optional*):
            Classes that it leads away from, instead of the prediction without a class.
    """

    class_labels: torch.Tensor | None = None
    text: Text | None = None
    negative: Text | None = None
    negative_class_labels: torch.Tensor | None = None

    def part(self, part: slice) -> "Condition":
        """Return the condition of some images of the batch."""

        def cut(value: torch.Tensor | Text | None) -> Any:
            return value.part(part) if isinstance(value, Text) else None if value is None else value[part]

        return Condition(*map(cut, self))

    def arguments(self, network: ModelMixin) -> dict[str, torch.Tensor]:
        """Return the arguments of a network, which may know less of the condition."""
        arguments = {}
        if self.class_labels is not None and network.config.get("num_class_embeds") is not None:
            arguments["class_labels"] = self.class_labels
        if self.text is not None and network.config.get("text_embed_dim") is not None:
            arguments["text_embeds"] = self.text.for_network(network)
        return arguments

    def opposite(self, network: ModelMixin) -> dict[str, torch.Tensor]:
        """Return the arguments of a network for the prediction that guidance leads away from."""
        arguments = {}
        if self.class_labels is not None:
            nothing = torch.full_like(self.class_labels, network.config.num_class_embeds)
            arguments["class_labels"] = nothing if self.negative_class_labels is None else self.negative_class_labels
        if self.text is not None:
            no_text = Text(self.text.embeds, torch.zeros_like(self.text.is_given))
            arguments["text_embeds"] = (self.negative or no_text).for_network(network)
        return arguments


NOTHING = Condition()


class Sampling(NamedTuple):
    """The settings of a call, from [`DDPMFacesPipeline.resolve_preset`].

    Args:
        scheduler (`SchedulerMixin`): A copy: it stores the current step, and threads may share a pipeline.
        num_inference_steps (`int`): Number of denoising steps.
        guidance ([`Guidance`]): How predictions are guided.
        network (`str`): The component that predicts, `"unet"` or `"student"`.
    """

    scheduler: SchedulerMixin
    num_inference_steps: int
    guidance: Guidance
    network: str = "unet"


class _Call(NamedTuple):
    """The values of a call that a callback can read from the pipeline."""

    num_timesteps: int
    guidance: Guidance


# The calls in progress, by the `id` of their pipeline. Each thread has its own context, so calls in different threads
# do not see each other's values, even if they share a pipeline.
_CALLS: ContextVar[dict[int, _Call]] = ContextVar("ddpm_faces_calls")


class DDPMFacesPipeline(DiffusionPipeline):
    """Pipeline for the generation of faces, without a condition, of given classes, or from prompts.

    Args:
        unet ([`DDPMFacesUNet`] or [`~diffusers.UNet2DModel`]): Network that predicts the noise.
        scheduler ([`DDPMFacesScheduler`] or another scheduler of its family):
            Scheduler that takes the denoising steps. To use another one:
            `pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)`.
        weights (`str`, *optional*):
            Origin of the weights: `"ema"`, or `"raw"` for the weights of the last step. Recorded in `pipeline.config`.
        guide ([`DDPMFacesUNet`] or [`~diffusers.UNet2DModel`], *optional*):
            Weaker network for autoguidance (https://huggingface.co/papers/2406.02507), trained on images of the same
            shape with the same noise schedule; see [`set_guide`].
        autoguidance_scale (`float`, defaults to 1.0): Default `autoguidance_scale` of `__call__`.
        guidance_interval (`tuple[int, int]`, *optional*):
            The lowest and the highest timestep with guidance, unless a preset says otherwise; by default all.
        student ([`DDPMFacesUNet`] or [`~diffusers.UNet2DModel`], *optional*):
            Network that was distilled from this model and its guide, for very few steps. A preset uses it.
        presets (`dict[str, dict]`, *optional*): Ways to sample, by name; see [`set_presets`].
        default_preset (`str`, *optional*): Preset of a call that names neither a preset nor a number of steps.
        guidance_scale (`float`, defaults to 1.0): Default `guidance_scale` of `__call__`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Tokenizer of `text_encoder`.
        text_encoder ([`~transformers.PreTrainedModel`], *optional*):
            Encoder of prompts, for a network with a `text_embed_dim`; see [`encode_prompt`].

    Raises:
        ValueError: The guide has another image shape or other classes; a scale is negative, or is not 1 although the
            model has nothing to guide it; `guidance_interval` is not within 0 to T - 1, or nothing guides the model;
            or a preset has a setting that is not allowed.
    """

    model_cpu_offload_seq = "text_encoder->guide->unet->student"
    _callback_tensor_inputs = ["latents"]
    _micro_batch_size: int | None = None  # known once the memory of a GPU was not enough
    _optional_components = ["guide", "student", *TEXT_COMPONENTS]

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        weights: str | None = None,
        guide: ModelMixin | None = None,
        autoguidance_scale: float = 1.0,
        guidance_interval: Sequence[int] | None = None,
        student: ModelMixin | None = None,
        presets: dict[str, dict[str, Any]] | None = None,
        default_preset: str | None = None,
        guidance_scale: float = 1.0,
        tokenizer: Any = None,
        text_encoder: Any = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, guide=guide, student=student)
        self.register_modules(tokenizer=tokenizer, text_encoder=text_encoder)
        self._check_text_encoder()
        self._notes: set[str] = set()  # warnings about the last prompts
        self.register_to_config(weights=weights)
        self.set_guidance(guidance_scale, autoguidance_scale, guidance_interval)
        if student is not None and _image_shape(student) != self.image_shape:
            ours, theirs = self.image_shape, _image_shape(student)
            raise ValueError(f"`student` must be of images of the shape {ours}, as this model, got {theirs}.")
        self.set_presets(presets, default_preset)

    def set_guide(
        self,
        guide: "DDPMFacesPipeline | None",
        autoguidance_scale: float = 1.0,
        guidance_interval: Sequence[int] | None = None,
    ) -> None:
        """Set the weaker model that guides this one (autoguidance), or remove it with `None`.

        The weaker network tends to make the same mistakes, only larger. Each step therefore extrapolates from the
        guide's prediction past the one of this pipeline (https://huggingface.co/papers/2406.02507, eq. 3):

            guide + autoguidance_scale (unet - guide)

        A good guide is a small network that was trained on the same images for a short time. Each step evaluates both
        networks, unless its timestep is outside `guidance_interval` (https://huggingface.co/papers/2404.07724). The
        guide is saved and published with the pipeline. `ddpm-faces evaluate MODEL DATA --guide GUIDE
        --autoguidance-scale 1.2` measures the gain.

        Args:
            guide ([`DDPMFacesPipeline`], *optional*): Pipeline of the weaker model. Its network is shared, not copied.
            autoguidance_scale (`float`, defaults to 1.0): 1 turns guidance off; 1.2 to 1.5 are typical.
            guidance_interval (`tuple[int, int]`, *optional*): See [`set_guidance`].

        Raises:
            ValueError: The guide differs in image shape, noise schedule or prediction type; `autoguidance_scale` is
                negative, or is not 1 although there is no guide; or `guidance_interval` is not within 0 to T - 1, or
                nothing guides the model.
        """
        if guide is not None:
            if not isinstance(guide, DDPMFacesPipeline):
                raise ValueError(f"`guide` must be a DDPMFacesPipeline or None, got {type(guide).__name__}.")
            for name in ("num_train_timesteps", "prediction_type"):
                ours, theirs = (pipeline.scheduler.config.get(name) for pipeline in (self, guide))
                if ours != theirs:
                    raise ValueError(
                        f"`guide` must be trained as this model was, with a `{name}` of {ours!r}, got {theirs!r}."
                    )
            ours, theirs = (getattr(pipeline.scheduler, "alphas_cumprod", None) for pipeline in (self, guide))
            if ours is None or theirs is None or not torch.allclose(ours.cpu(), theirs.cpu(), atol=1e-4):
                raise ValueError("`guide` must be trained as this model was, with the same noise at each timestep.")
        network = None if guide is None else guide.unet
        self.check_guide(network, autoguidance_scale)
        self._check_interval(guidance_interval, network is not None or self._has_null)
        self.register_modules(guide=network and network.to(self.unet.device))
        self.set_guidance(self.config.guidance_scale, autoguidance_scale, guidance_interval)

    def set_guidance(
        self,
        guidance_scale: float = 1.0,
        autoguidance_scale: float = 1.0,
        guidance_interval: Sequence[int] | None = None,
    ) -> None:
        """Set how calls are guided by default. See [`Guidance`].

        Args:
            guidance_scale (`float`, defaults to 1.0): Scale of classifier-free guidance; 1 turns it off.
            autoguidance_scale (`float`, defaults to 1.0): Scale of autoguidance; 1 turns it off.
            guidance_interval (`tuple[int, int]`, *optional*):
                The lowest and the highest timestep with guidance; by default all.

        Raises:
            ValueError: A scale is negative, or is not 1 although the model has nothing to guide it; or
                `guidance_interval` is not within 0 to T - 1, or nothing guides the model.
        """
        self.check_guidance(Guidance(guidance_scale, autoguidance_scale, guidance_interval))
        interval = None if guidance_interval is None else list(guidance_interval)
        self.register_to_config(
            guidance_scale=guidance_scale, autoguidance_scale=autoguidance_scale, guidance_interval=interval
        )

    @property
    def presets(self) -> dict[str, dict[str, Any]]:
        """Ways to sample, by name, slow to fast: `"exact"` (all T steps of DDPM), then those of [`set_presets`]."""
        exact = {"algorithm": "ddpm", "num_inference_steps": self.scheduler.config.num_train_timesteps}
        others = sorted((self.config.presets or {}).items(), key=lambda item: -item[1]["num_inference_steps"])
        return {EXACT: exact, **dict(others)}

    def set_presets(self, presets: dict[str, dict[str, Any]] | None, default_preset: str | None = None) -> None:
        """Set the ways to sample from this model, which are saved and published with it.

        A preset is a dictionary. It needs `num_inference_steps`, and may set `guidance_scale`, `autoguidance_scale`,
        `guidance_interval`, `network` (`"unet"` or `"student"`) and these arguments of [`DDPMFacesScheduler`]:
        `algorithm`, `timestep_spacing`, `solver_order`, `sigma_min`, `epsilon_scaling`, `clip_sample` and
        `tuned_steps`. Whatever it leaves out is as in the pipeline.
        `ddpm-faces tune` makes the usual ones, `"fast"` (8 steps) and `"draft"` (6 steps), and makes `"fast"` the
        default.

        Args:
            presets (`dict[str, dict]`, *optional*): The presets by name, without `"exact"`, which always exists.
            default_preset (`str`, *optional*): Preset of a call that names neither a preset nor a number of steps.

        Raises:
            ValueError: A preset has a setting that is not allowed, or the default is not among the presets.
        """
        presets = {} if presets is None else presets
        if not isinstance(presets, dict):
            raise ValueError(f"`presets` must be a dictionary or None, got {presets!r}.")
        for name, settings in presets.items():
            if not isinstance(name, str) or not name.isidentifier() or name == EXACT:
                raise ValueError(f"`presets` must have words other than {EXACT!r} as names, got {name!r}.")
            if not isinstance(settings, dict) or "num_inference_steps" not in settings:
                raise ValueError(
                    f"`presets[{name!r}]` must be a dictionary with `num_inference_steps`, got {settings!r}."
                )
            allowed = (*PRESET_CALL_SETTINGS, *PRESET_SCHEDULER_SETTINGS)
            unknown = [key for key in settings if key not in allowed]
            if unknown:
                raise ValueError(f"`presets[{name!r}]` may set {', '.join(allowed)}, got {unknown[0]!r}.")
            self._check_steps(settings["num_inference_steps"], f"`presets[{name!r}]['num_inference_steps']`")
            try:
                for scale in ("guidance_scale", "autoguidance_scale"):
                    _check_scale(scale, settings.get(scale, 1.0))
                self._check_interval(settings.get("guidance_interval"))
                if self.takes_presets:
                    self._scheduler_with(settings)
            except ValueError as error:
                raise ValueError(f"`presets[{name!r}]`: {error}") from error
            if settings.get("network", "unet") not in ("unet", "student"):
                raise ValueError(
                    f"`presets[{name!r}]['network']` must be 'unet' or 'student', got {settings['network']!r}."
                )
        if default_preset is not None and default_preset not in (EXACT, *presets):
            raise ValueError(
                f"`default_preset` must be one of {', '.join((EXACT, *presets))}, got {default_preset!r}."
            )
        self.register_to_config(presets=presets, default_preset=default_preset)

    @property
    def takes_presets(self) -> bool:
        """Whether presets apply: a scheduler of another class or algorithm is a choice of its own."""
        return self._scheduler_is_of({"DDPMFacesScheduler"}) and self.scheduler.config.get("algorithm") == "ddpm"

    def _scheduler_with(self, settings: dict[str, Any]) -> SchedulerMixin:
        """Return a copy of the scheduler with the settings of a preset."""
        # `from_config` would first look at every scheduler of diffusers, which takes longer than a step of a small
        # network.
        cls, config = type(self.scheduler), self.scheduler.config
        kept = {name: config[name] for name in inspect.signature(cls.__init__).parameters if name in config}
        changes = {name: settings[name] for name in PRESET_SCHEDULER_SETTINGS if name in settings}
        return cls(**{**kept, **changes})

    def resolve_preset(
        self,
        preset: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        autoguidance_scale: float | None = None,
    ) -> Sampling:
        """Return the settings of a call with these arguments.

        Args:
            preset (`str`, *optional*): As in `__call__`.
            num_inference_steps (`int`, *optional*): As in `__call__`.
            guidance_scale (`float`, *optional*): As in `__call__`.
            autoguidance_scale (`float`, *optional*): As in `__call__`.

        Raises:
            ValueError: There is no such preset, the scheduler does not take presets, or the preset's network is
                missing or did not learn this number of steps.
        """
        total = self.scheduler.config.num_train_timesteps
        if preset is not None and not self.takes_presets:
            name, algorithm = type(self.scheduler).__name__, self.scheduler.config.get("algorithm")
            own = f" with `algorithm={algorithm!r}`" if algorithm else ""
            raise ValueError(
                f"`preset` {preset!r} needs the scheduler that the model was saved with, got {name}{own}: give "
                "`num_inference_steps` instead."
            )
        if preset is not None and preset not in self.presets:
            raise ValueError(f"`preset` must be one of {', '.join(self.presets)}, got {preset!r}.")
        if preset is None and num_inference_steps is None and self.takes_presets:
            preset = self.config.default_preset

        settings: dict[str, Any] = {}
        if preset is not None:
            settings = self.presets[preset]
        elif self.takes_presets and num_inference_steps not in (None, total):
            fast = (self.config.presets or {}).get("fast", {})
            settings = {**SOLVER, **(fast if fast.get("network", "unet") == "unet" else {})}
        if num_inference_steps is None:
            num_inference_steps = settings.get("num_inference_steps", total)
        asked = {"guidance_scale": guidance_scale, "autoguidance_scale": autoguidance_scale}
        scales: dict[str, Any] = {
            name: settings.get(name, self.config[name]) if scale is None else scale for name, scale in asked.items()
        }
        guidance = Guidance(
            **scales, guidance_interval=settings.get("guidance_interval") or self.config.guidance_interval
        )
        network = settings.get("network", "unet")
        if network == "student":
            self._check_student(preset, settings, num_inference_steps, scales)
        scheduler = self._scheduler_with(settings) if settings else copy.deepcopy(self.scheduler)
        return Sampling(scheduler, num_inference_steps, guidance, network)

    def _check_student(
        self, preset: str | None, settings: dict, num_inference_steps: int, scales: dict[str, float]
    ) -> None:
        """Raise a `ValueError` if the student cannot take these steps."""
        if self.student is None:
            raise ValueError(f"`preset` {preset!r} needs the model's `student`, which was not loaded.")
        learned = sorted(settings.get("tuned_steps") or {}, key=int)
        if learned and str(num_inference_steps) not in learned:
            raise ValueError(
                f"`num_inference_steps` must be one of those that the student learned, {', '.join(learned)}, got "
                f"{num_inference_steps}."
            )
        for name, scale in scales.items():
            if scale != 1:
                raise ValueError(
                    f"`{name}` must be 1 for the student, which has learned from a guided model, got {scale}."
                )

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "DDPMFacesPipeline":
        """Create a pipeline that shares the networks and the scheduler of another one.

        Args:
            pipeline ([`~diffusers.DiffusionPipeline`]): Pipeline whose network and scheduler this class accepts.
            kwargs:
                Components and settings to use instead, or `dtype`. By default the networks keep their dtype, whereas
                [`~diffusers.DiffusionPipeline.from_pipe`] would cast them to float32, in the given pipeline as well.
        """
        # diffusers passes a network on only if its class is exactly that of the type hint.
        names = (*MODEL_COMPONENTS, *TEXT_COMPONENTS)
        networks = {name: pipeline.components[name] for name in names if pipeline.components.get(name) is not None}
        if "torch_dtype" not in kwargs and "unet" in networks:
            kwargs.setdefault("dtype", networks["unet"].dtype)
        with _without_empty_warning():
            return super().from_pipe(pipeline, **{**networks, **kwargs})

    @property
    def num_timesteps(self) -> int:
        """Number of denoising steps of the call in progress, or the default.

        A `callback_on_step_end` reads the value of its own call, even if another thread uses the same pipeline.
        """
        call = self._call
        return self.resolve_preset().num_inference_steps if call is None else call.num_timesteps

    @property
    def guidance_scale(self) -> float:
        """Scale of classifier-free guidance of the call in progress, as for [`num_timesteps`], or the default."""
        return self._guidance.guidance_scale

    @property
    def autoguidance_scale(self) -> float:
        """Scale of autoguidance of the call in progress, as for [`num_timesteps`], or the default."""
        return self._guidance.autoguidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether classifier-free guidance acts in the call in progress, or by default."""
        return self.guidance_scale != 1

    @property
    def _guidance(self) -> Guidance:
        call = self._call
        return self.resolve_preset().guidance if call is None else call.guidance

    @property
    def _call(self) -> _Call | None:
        return _CALLS.get({}).get(id(self))

    def with_scheduler(self, scheduler: SchedulerMixin) -> "DDPMFacesPipeline":
        """Create a pipeline that shares the networks of this one and uses another scheduler."""
        components = {**self.components, "scheduler": scheduler}
        settings = {name: self.config[name] for name in SETTINGS}
        return type(self)(**components, **settings)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "DDPMFacesPipeline":
        """Load a pipeline from a folder or from the Hub, without running code from the repository.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder, or `"user/name"` on the Hub.
            kwargs: As in [`~diffusers.DiffusionPipeline.from_pretrained`].

        Raises:
            ValueError: `use_safetensors` is `False` (pickles can run code and are not loaded), the folder does not
                contain a pipeline of this class, or a later version of the package saved it.
            OSError: The folder or repository is not found, not accessible or not reachable, or has no safetensors.
        """
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise ValueError(
                f"`use_safetensors` must be True, got {kwargs['use_safetensors']!r}: other weights are pickles, which "
                "can run code, and are not loaded."
            )
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except Exception as error:  # errors of the HTTP library, which depends on the version of the Hub client
            if not type(error).__module__.startswith(("httpx", "requests")):
                raise
            # For some requests, huggingface_hub does not wrap the exceptions of the HTTP library.
            raise OSError(
                f"{pretrained_model_name_or_path} could not be loaded because the connection was lost: {error} Load "
                "it again: complete files are kept."
            ) from error

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs,
    ) -> None:
        """Save a folder that loads with this package, or without it by `trust_remote_code=True`.

        Args:
            save_directory (`str` or `os.PathLike`): Folder to save to. A pipeline in it is overwritten.
            safe_serialization (`bool`, defaults to `True`): Must be `True`: only safetensors are written.
            variant (`str`, *optional*): As in [`~diffusers.DiffusionPipeline.save_pretrained`].
            max_shard_size (`int` or `str`, *optional*): As in [`~diffusers.DiffusionPipeline.save_pretrained`].
            push_to_hub (`bool`, defaults to `False`): Whether to publish the pipeline as well, with [`push_to_hub`].
            repo_id (`str`, *optional*):
                Repository to publish to. Defaults to the name of the folder in the namespace of the token's owner.
            kwargs: With `push_to_hub=True`, the other arguments of [`push_to_hub`].

        Raises:
            ValueError: `safe_serialization` is `False` (pickles are not saved), or a component could not be loaded
                again.
            HubError: As in [`push_to_hub`].
            ImportError: `push_to_hub=True` without the ddpm-faces package.
        """
        if safe_serialization is not True:
            raise ValueError("`safe_serialization` must be True: other weights are pickles, which can run code.")
        index = json.loads(self.to_json_string())
        for name in (*MODEL_COMPONENTS, *TEXT_COMPONENTS, "scheduler"):
            if name in index and not _is_component(name, index[name]):
                raise ValueError(
                    f"`{name}` {type(self.components[name]).__name__} could not be loaded again, so nothing is saved: "
                    "use a class of this package, diffusers' UNet2DModel, a scheduler of diffusers, or a tokenizer "
                    "and text encoder of transformers."
                )
        hub = _publisher() if push_to_hub else None
        if hub is not None:  # report problems with publishing before saving
            name = repo_id or Path(save_directory).resolve().name
            inspect.signature(hub.push).bind(self, name, **kwargs)
            repo_id = hub.check_permission(name, kwargs.get("private"), kwargs.get("token"))
        elif kwargs or repo_id is not None:
            unexpected = [*kwargs, *(["repo_id"] if repo_id is not None else [])]
            raise TypeError(f"save_pretrained() got arguments of `push_to_hub=True`: {', '.join(unexpected)}.")
        super().save_pretrained(save_directory, variant=variant, max_shard_size=max_shard_size)
        for name in (Path(__file__).name, *COMPANION_FILES):  # each component does the same with its file
            if Path(__file__).with_name(name).is_file():
                shutil.copyfile(Path(__file__).with_name(name), Path(save_directory, name))
        if hub is not None:
            hub.push(self, repo_id, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """Publish on the Hub with a model card, as [`ddpm_faces.hub.push`] does.

        Args:
            repo_id (`str`): Repository to publish to, `"user/name"`.
            kwargs: The other arguments of [`ddpm_faces.hub.push`].

        Returns:
            `str`: URL of the commit.

        Raises:
            ImportError: The ddpm-faces package is not installed.
            HubError: The Hub refused or could not be reached, or the pipeline failed the checks.
        """
        return _publisher().push(self, repo_id, **kwargs)

    def to_json_string(self) -> str:
        """Return the content of `model_index.json`."""
        index = json.loads(super().to_json_string())
        # Without a guide or presets, earlier versions of the package can load the folder.
        if self.guide is None:
            del index["guide"], index["autoguidance_scale"]
        has_scale = index["guidance_scale"] != 1
        if not has_scale:
            del index["guidance_scale"]
        has_interval = index["guidance_interval"] is not None
        if not has_interval:
            del index["guidance_interval"]
        for name in ("student", *TEXT_COMPONENTS):
            if getattr(self, name) is None:
                del index[name]
        has_presets = bool(index["presets"]) or index["default_preset"] is not None or self.student is not None
        if not has_presets:
            del index["presets"], index["default_preset"]
        for name, part in self.components.items():
            if type(part).__name__ in CODE_FILES:
                index[name] = [CODE_FILES[type(part).__name__], type(part).__name__]
                if name == "unet":
                    index["auto_map"] = {"AutoModel": ".".join(index[name])}  # where diffusers looks for it
        if index.get("tokenizer") == ["transformers", "TokenizersBackend"]:  # its name in all versions of transformers
            index["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
        index["_class_name"] = [CODE_FILES["DDPMFacesPipeline"], "DDPMFacesPipeline"]
        is_plain = self.guide is self.text_encoder is None and not (has_scale or has_interval or has_presets)
        index["_format_version"] = 1 if is_plain else FORMAT_VERSION
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        """Read `model_index.json`, which may be untrusted, and present the classes of this package as diffusers' own.

        diffusers reads the file to decide what to download, and refuses classes that neither it nor the repository
        defines. To load them, [`load_config`] replaces these entries with the modules of this package.
        """
        try:
            index = super()._dict_from_json_file(json_file)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{json_file} is not valid JSON: {error}.") from error
        _check_index(index, cls, json_file)
        index = upgraded(index)
        index["_class_name"] = "DDPMFacesPipeline"
        if _is_installed():
            for name, (_, class_name) in _parts(index).items():
                if class_name in CODE_FILES:
                    index[name] = ["diffusers", class_name]
        return index

    @classmethod
    def load_config(cls, *args, **kwargs):
        """Load as [`~diffusers.ConfigMixin.load_config`] does, with the classes of this package taken from it."""
        loaded = super().load_config(*args, **kwargs)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        if args and os.path.isdir(args[0]):
            _check_components(index, Path(args[0]))
        if _is_installed():
            for name, (_, class_name) in _parts(index).items():
                if class_name in CODE_FILES:
                    module = importlib.import_module(f".{CODE_FILES[class_name]}", __package__)
                    index[name] = [module.__name__, class_name]
        return loaded

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple[dict, dict, dict]:
        # `auto_map` is for `AutoModel` and not an argument of this class.
        config_dict = {k: v for k, v in upgraded(config_dict).items() if k != "auto_map"}
        return super().extract_init_dict(config_dict, **kwargs)

    def check_inputs(
        self,
        batch_size: int,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        class_labels: Sequence[int] | torch.Tensor | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
        eta: float,
        guidance: Guidance = UNGUIDED,
    ) -> None:
        """Raise a `ValueError` for invalid arguments of `__call__`, before any work starts."""
        scheduler_name = type(self.scheduler).__name__
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be an integer of at least 1, got {batch_size!r}.")
        self._check_steps(num_inference_steps, "`num_inference_steps`")
        generators = generator if isinstance(generator, list) else [generator]
        # In a list, `None` would silently make that image irreproducible.
        if generator is not None and not all(isinstance(g, torch.Generator) for g in generators):
            raise ValueError(
                f"`generator` must be a torch.Generator, a list of them, or None, got {generator!r}: create one "
                "with torch.Generator().manual_seed(seed)."
            )
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` as a list must hold one generator per image: got {len(generator)} for a `batch_size` "
                f"of {batch_size}."
            )
        shape = (batch_size, *self.image_shape)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must be of shape {shape}, got {tuple(latents.shape)}.")
        if output_type not in OUTPUT_TYPES:
            allowed = ", ".join(map(repr, OUTPUT_TYPES))
            raise ValueError(f"`output_type` must be one of {allowed}, got {output_type!r}.")
        num_classes = self.unet.config.get("num_class_embeds")
        if class_labels is None and num_classes is not None and not self._has_null:
            raise ValueError(f"`class_labels` must be given: this model has {num_classes} classes.")
        if class_labels is not None and num_classes is None:
            raise ValueError("`class_labels` must be None: this model has no classes.")
        if class_labels is not None:
            labels = [int(label) for label in class_labels]
            if len(labels) != batch_size or not all(0 <= label < num_classes for label in labels):
                raise ValueError(
                    f"`class_labels` must be {batch_size} (`batch_size`) integers from 0 to {num_classes - 1}, got "
                    f"{labels}."
                )
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be of {self._callback_tensor_inputs}, got "
                f"{sorted(unknown)}."
            )
        if not 0 <= eta <= 1:
            raise ValueError(f"`eta` must lie in [0, 1], got {eta}.")
        self.check_guidance(guidance)
        if not hasattr(self.scheduler, "betas"):
            raise ValueError(
                f"`scheduler` {scheduler_name} is not defined by betas: it uses its own noise levels, which a network "
                "that was trained with DDPM does not support."
            )
        config = self.scheduler.config
        is_zero_snr = config.get("rescale_betas_zero_snr") or bool((self.scheduler.alphas_cumprod == 0).any())
        if config.get("prediction_type") == "epsilon" and is_zero_snr:
            raise ValueError(
                f"`scheduler` {scheduler_name} has betas of zero terminal SNR: the last timestep is pure noise, from "
                "which its `prediction_type` 'epsilon' cannot tell the image."
            )
        if self._scheduler_is_of(NOT_FOR_ZERO_SNR) and bool((self.scheduler.alphas_cumprod <= 1e-7).any()):
            raise ValueError(
                f"`scheduler` {scheduler_name} divides by the signal of the last timestep, which these betas (zero "
                "terminal SNR) make zero: use DDPMFacesScheduler, DDIMScheduler or UniPCMultistepScheduler."
            )

    def _check_steps(self, num_inference_steps: int, name: str) -> None:
        total = self.scheduler.config.num_train_timesteps
        if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int):
            raise ValueError(f"{name} must be an integer or None, got {num_inference_steps!r}.")
        if not 1 <= num_inference_steps <= total:
            raise ValueError(
                f"{name} must be from 1 to {total}, the number of timesteps in training, got {num_inference_steps}."
            )

    def _guidance_of(self, guidance_scale: float | None, autoguidance_scale: float = 1.0) -> Guidance:
        return Guidance(self.config.guidance_scale if guidance_scale is None else guidance_scale, autoguidance_scale)

    def check_guidance(self, guidance: Guidance) -> None:
        """Raise a `ValueError` if this model cannot be guided in this way."""
        self._check_null(guidance.guidance_scale)
        self.check_guide(self.guide, guidance.autoguidance_scale)
        self._check_interval(guidance.guidance_interval, self.guide is not None or self._has_null)

    def check_guide(self, guide: ModelMixin | None, autoguidance_scale: float) -> None:
        """Raise a `ValueError` if this network cannot guide this pipeline at this scale."""
        _check_scale("autoguidance_scale", autoguidance_scale)
        if guide is None:
            if autoguidance_scale != 1:
                raise ValueError(
                    f"`autoguidance_scale` must be 1 for a model without a guide, got {autoguidance_scale}."
                )
            return
        ours, theirs = self.image_shape, _image_shape(guide)
        if ours != theirs:
            raise ValueError(f"`guide` must be of images of the shape {ours}, as this model, got {theirs}.")
        classes, known = (network.config.get("num_class_embeds") for network in (guide, self.unet))
        if classes not in (None, known):
            raise ValueError(f"`guide` must have no classes or as many as this model, {known}, got {classes}.")
        length, known = (network.config.get("text_embed_dim") for network in (guide, self.unet))
        if length not in (None, known):
            raise ValueError(f"`guide` must have a `text_embed_dim` of None or {known}, as this model, got {length}.")

    @property
    def _has_null(self) -> bool:
        """Whether the network can predict without a condition, in addition to predicting with one."""
        return bool(self.unet.config.get("null_class")) or self.unet.config.get("text_embed_dim") is not None

    def _check_null(self, guidance_scale: float) -> None:
        """Raise a `ValueError` if classifier-free guidance of this scale is not possible."""
        _check_scale("guidance_scale", guidance_scale)
        if guidance_scale == 1 or self._has_null:
            return
        if self.unet.config.get("num_class_embeds") is None:
            hint = "it knows neither classes nor texts. `autoguidance_scale` is the scale of its guide"
        else:
            hint = "it was trained without `condition_dropout`, so it never sees an image without its class"
        raise ValueError(f"`guidance_scale` must be 1 for this model, got {guidance_scale}: {hint}.")

    def _check_interval(self, interval: Any, is_guided: bool = True) -> None:
        if interval is None:
            return
        if not is_guided:
            raise ValueError(f"`guidance_interval` must be None for a model without a guide, got {interval!r}.")
        last = self.scheduler.config.num_train_timesteps - 1
        are_integers = isinstance(interval, list | tuple) and all(type(limit) is int for limit in interval)
        if not are_integers or len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= last:
            raise ValueError(
                f"`guidance_interval` must be two timesteps from 0 to {last}, the lower one first, or None; got "
                f"{interval!r}."
            )

    def _scheduler_is_of(self, names: Collection[str]) -> bool:
        return any(cls.__name__ in names for cls in type(self.scheduler).__mro__)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that a call generates."""
        return _image_shape(self.unet)

    def prepare_latents(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        init_noise_sigma: float | torch.Tensor = 1.0,
    ) -> torch.Tensor:
        """Return x_T: `latents`, or standard normal noise, times the scheduler's `init_noise_sigma`.

        The result is float32 for any dtype of the weights, because rounding errors would add up over the steps.
        """
        device = self._execution_device
        if latents is None:
            shape = (batch_size, *self.image_shape)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        return latents.to(device=device, dtype=torch.float32) * init_noise_sigma

    def encode_prompt(self, prompt: str | list[str]) -> torch.Tensor:
        """Encode prompts for `prompt_embeds`.

        Words that the tokenizer does not know are ignored, and the end of a long prompt is cut off. A warning names
        them.

        Args:
            prompt (`str` or `list[str]`): The prompts. An empty one has the embedding of no text.

        Returns:
            `torch.Tensor` of shape `(num_prompts, text_embed_dim)`: The embeddings.

        Raises:
            ValueError: The model has no text encoder, or a prompt is not a text.
        """
        with torch.no_grad():
            return self.encode_texts(prompt).for_network(self.unet).float()

    def prompt_notes(self, prompt: str | list[str]) -> list[str]:
        """Name the words of prompts that the model does not know, and the ends that are cut off, in sentences.

        Raises:
            ValueError: The model has no text encoder, or a prompt is not a text.
        """
        if self.check_prompts(prompt) is None:
            raise ValueError("`prompt` must be a text or a list of texts, got None.")
        return prompt_notes(self.tokenizer, self.text_encoder, prompt if isinstance(prompt, list) else [prompt])

    @torch.no_grad()
    def encode_texts(self, prompt: str | list[str]) -> Text:
        """Encode prompts for a [`Condition`]. It raises and warns as [`encode_prompt`] does."""
        prompts, device = prompt if isinstance(prompt, list) else [prompt], self._execution_device
        notes = self.prompt_notes(prompts)
        for note in [note for note in notes if note not in self._notes]:  # once, not for each batch
            logger.warning(note)
        self._notes = set(notes)
        tokens = tokenize(self.tokenizer, self.text_encoder, prompts)
        tokens = {name: ids.to(self.text_encoder.device) for name, ids in tokens.items()}
        with evaluating(self.text_encoder):
            embeds = pooled(self.text_encoder, **tokens)
        is_blank = torch.tensor([not text.strip() for text in prompts])
        return Text(embeds.to(device), (tokens["attention_mask"].any(dim=1).cpu() & ~is_blank).to(device))

    def _texts(
        self, prompt: str | list[str] | None, embeds: torch.Tensor | None, count: int, copies: int
    ) -> Text | None:
        """Return the texts or embeddings of `count` prompts, each for `copies` images."""
        if prompt is not None:
            text = self.encode_texts(prompt)
        elif embeds is not None:
            embeds = embeds.to(self._execution_device)
            text = Text(embeds, torch.ones(len(embeds), dtype=torch.bool, device=embeds.device))
        else:
            return None
        return Text(*(values.expand(count, *values.shape[1:]).repeat_interleave(copies, dim=0) for values in text))

    def _condition(
        self,
        class_labels: Sequence[int] | torch.Tensor | None,
        count: int,
        copies: int,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
    ) -> Condition:
        """Return the condition of `count * copies` images: `count` prompts, if any, each for `copies` images."""
        if class_labels is not None:
            class_labels = torch.as_tensor(class_labels, device=self._execution_device)
        text = self._texts(prompt, prompt_embeds, count, copies)
        return Condition(class_labels, text, self._texts(negative_prompt, negative_prompt_embeds, count, copies))

    def check_prompts(
        self,
        prompt: Any = None,
        negative_prompt: Any = None,
        num_images_per_prompt: Any = 1,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
    ) -> int | None:
        """Return the number of prompts, or `None` without any. Raise a `ValueError` if they are not allowed."""
        texts = {"prompt": prompt, "negative_prompt": negative_prompt}
        tensors = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        all_texts = {**texts, **tensors}
        given = [name for name, value in all_texts.items() if value is not None]
        if isinstance(num_images_per_prompt, bool) or not isinstance(num_images_per_prompt, int):
            raise ValueError(f"`num_images_per_prompt` must be an integer, got {num_images_per_prompt!r}.")
        if num_images_per_prompt < 1:
            raise ValueError(f"`num_images_per_prompt` must be at least 1, got {num_images_per_prompt}.")
        if not given:
            if num_images_per_prompt != 1:
                raise ValueError(f"`num_images_per_prompt` ({num_images_per_prompt}) needs a `prompt`.")
            return None
        length = self.unet.config.get("text_embed_dim")
        if length is None:
            raise ValueError(f"`{given[0]}` must be None: this model was not trained with texts.")
        for name, value in texts.items():
            if value is None:
                continue
            values = value if isinstance(value, list) else [value]
            if not values or not all(isinstance(text, str) for text in values):
                raise ValueError(f"`{name}` must be a text or a list of texts, got {value!r}.")
            if self.text_encoder is None or self.tokenizer is None:
                raise ValueError(f"`{name}` needs the model's `tokenizer` and `text_encoder`, which were not loaded.")
            if tensors[f"{name}_embeds"] is not None:
                raise ValueError(f"Give either `{name}` or `{name}_embeds`, not both.")
        for name, tensor in tensors.items():
            if tensor is not None and (tensor.ndim != 2 or tensor.shape[1] != length):
                raise ValueError(f"`{name}` must be of shape (num_prompts, {length}), got {tuple(tensor.shape)}.")
        sizes = {name: 1 if isinstance(all_texts[name], str) else len(all_texts[name]) for name in given}
        count = sizes.get("prompt", sizes.get("prompt_embeds"))
        if count is None:
            raise ValueError(f"`{given[0]}` needs a `prompt`.")
        for name, size in sizes.items():
            if size not in (1, count):
                raise ValueError(f"`{name}` must have one text, or one for each of the {count} prompts, got {size}.")
        return count

    def _check_text_encoder(self) -> None:
        """Raise a `ValueError` if the text encoder does not fit the network."""
        length = self.unet.config.get("text_embed_dim")
        if self.text_encoder is None:
            return
        if self.tokenizer is None:
            raise ValueError("`text_encoder` needs its `tokenizer`.")
        if self.text_encoder.config.hidden_size != length:
            raise ValueError(
                f"`text_encoder` must have a `hidden_size` of {length}, the `text_embed_dim` of the network, got "
                f"{self.text_encoder.config.hidden_size}."
            )

    def optimize(self) -> "DDPMFacesPipeline":
        """Convert the networks to the memory format and the dtype in which their device is fastest.

        The memory format is channels last. The dtype is bfloat16 on CPUs and GPUs with instructions for it, otherwise
        that of the weights. The faces stay the same up to rounding errors, but the weights are no longer the exact
        ones: save or publish a pipeline before, or load it again.

        Returns:
            [`DDPMFacesPipeline`]: This pipeline.
        """
        for network in (self.unet, self.guide, self.student):
            if network is not None:
                convert(network, fastest_dtype(network))
        return self

    def predict(
        self,
        sample: torch.Tensor,
        timestep: float | torch.Tensor,
        condition: Condition = NOTHING,
        guidance: Guidance = UNGUIDED,
        network: str = "unet",
    ) -> torch.Tensor:
        """Predict the noise, or the quantity of the scheduler's `prediction_type`, with guidance.

        The networks see the batch in parts: on CPUs of a size at which they are fastest, on GPUs of half the size
        whenever the memory is not enough. So the batch may be larger than the networks alone could take.

        Args:
            sample (`torch.Tensor` of shape `(batch, channels, height, width)`): x_t.
            timestep (`int`, `float` or `torch.Tensor` of shape `()` or `(batch,)`): t, 0 to T - 1.
            condition ([`Condition`], *optional*): What the images should show; by default nothing in particular.
            guidance ([`Guidance`], *optional*): By default none, so that the network alone predicts. An interval of
                `None` is that of the pipeline.
            network (`str`, defaults to `"unet"`): The component that predicts, `"unet"` or `"student"`.

        Returns:
            `torch.Tensor` of the shape of `sample`, or of twice its channels with a learned variance: always float32.
        """
        batch_size = len(sample)
        while True:
            size = min(batch_size, self._micro_batch_size or _micro_batch_size_on(sample))
            try:
                predictions = []
                for first in range(0, batch_size, size):
                    part = slice(first, first + size)
                    t = timestep[part] if isinstance(timestep, torch.Tensor) and timestep.ndim else timestep
                    predictions.append(self._predict(sample[part], t, condition.part(part), guidance, network))
                return predictions[0] if len(predictions) == 1 else torch.cat(predictions)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
            # Outside the handler, which would keep the tensors of the failed attempt alive.
            torch.cuda.empty_cache()
            self._micro_batch_size = (size + 1) // 2

    def _predict(
        self,
        sample: torch.Tensor,
        timestep: float | torch.Tensor,
        condition: Condition,
        guidance: Guidance,
        network: str,
    ) -> torch.Tensor:
        unet = getattr(self, network)  # `components` inspects the signature of the class at each call
        scale, autoguidance_scale, interval = guidance
        if condition.class_labels is None and condition.text is None:  # there is nothing to guide towards
            scale = 1.0
        interval = interval or self.config.guidance_interval
        is_guided = torch.tensor(True)
        if interval is not None and (scale, autoguidance_scale) != (1, 1):
            # Timesteps are usually on the CPU, where the comparison does not wait for the GPU.
            is_guided = torch.as_tensor((interval[0] <= timestep) & (timestep <= interval[1]))
            if not is_guided.any():
                scale = autoguidance_scale = 1.0

        def weight(scale: float) -> torch.Tensor:
            return torch.where(is_guided, scale, 1.0).view(-1, 1, 1, 1).to(sample.device)

        arguments, unconditional = condition.arguments(unet), None
        if scale == 1:
            output = unet(sample.to(unet.dtype), timestep, **arguments).sample.float()
        else:  # both halves in one batch
            opposite = condition.opposite(unet)
            both = {name: torch.cat([value, opposite[name]]) for name, value in arguments.items()}
            twice = timestep.repeat(2) if isinstance(timestep, torch.Tensor) and timestep.ndim else timestep
            outputs = unet(sample.to(unet.dtype).repeat(2, 1, 1, 1), twice, **both).sample.float()
            output, unconditional = outputs.chunk(2)
        if unconditional is None and autoguidance_scale == 1:
            return output
        channels = sample.shape[1]
        conditional, variance = output.tensor_split([channels], dim=1)
        prediction = conditional
        if autoguidance_scale != 1:
            arguments = condition.arguments(self.guide)
            worse = self.guide(sample.to(self.guide.dtype), timestep, **arguments).sample.float()
            prediction = worse[:, :channels].lerp(conditional, weight(autoguidance_scale))
        if unconditional is not None:
            prediction = prediction + (weight(scale) - 1) * (conditional - unconditional[:, :channels])
        return torch.cat([prediction, variance], dim=1)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | str | list[str] | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["DDPMFacesPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        class_labels: Sequence[int] | torch.Tensor | None = None,
        eta: float = 0.0,
        guidance_scale: float | None = None,
        preset: str | None = None,
        autoguidance_scale: float | None = None,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate faces.

        Args:
            batch_size (`int`, *optional*):
                Number of images; defaults to 1. With prompts, their number says how many. A first argument of text is
                `prompt`, so that you can call `pipeline("a smiling woman")`.
            num_inference_steps (`int`, *optional*):
                Denoising steps, 1 to T. Defaults to the number of the preset, or to T without one. Fewer than T steps
                are those of a fast solver, DPM-Solver++, unless a preset or another scheduler says otherwise.
            generator (`torch.Generator` or a list of one per image, *optional*):
                Makes the result reproducible. With a list, image i depends only on generator i, not on the batch.
            latents (`torch.Tensor` of shape `(batch_size, channels, height, width)`, *optional*):
                Standard normal noise to start from; by default it is drawn from `generator`.
            output_type (`str`, defaults to `"pil"`):
                `"pil"` (`PIL.Image`), `"np"` (`(batch, height, width, channels)` in [0, 1]), `"pt"` (`(batch,
                channels, height, width)` in [0, 1]) or `"latent"` (the same in [-1, 1], not clamped).
            return_dict (`bool`, defaults to `True`): Whether to return an output class, or a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipeline, step_index, timestep, {"latents": ...})` after each step. Latents in the
                dictionary that it returns replace the current ones. It may read `pipeline.num_timesteps`,
                `pipeline.guidance_scale` and `pipeline.autoguidance_scale`.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                Names of the tensors that the callback receives.
            class_labels (`list[int]` or `torch.Tensor`, *optional*):
                Class of each image, for a model with classes. Without them, a model that was trained with
                `condition_dropout` generates images of any class.
            eta (`float`, defaults to 0.0): Noise of DDIM, from 0 to 1. Other schedulers ignore it.
            guidance_scale (`float`, *optional*):
                Scale of classifier-free guidance, at least 0: 1 turns it off, and larger values follow the condition
                more closely, with less variety. Defaults to that of the preset, or to the pipeline's `guidance_scale`.
            preset (`str`, *optional*):
                A way to sample, one of `pipeline.presets`: `"exact"` is all T steps of DDPM; a model may have others,
                such as `"fast"` and `"draft"`. Defaults to the model's own default, or to `"exact"`. With
                `num_inference_steps`, the preset's algorithm takes that number of steps.
            autoguidance_scale (`float`, *optional*):
                Scale of autoguidance, at least 0: 0 is the guide alone, 1 turns it off, and larger values move away
                from the guide. Defaults to that of the preset, or to the pipeline's `autoguidance_scale`.
            prompt (`str` or `list[str]`, *optional*):
                What the faces should show, for a model with a text encoder. An empty text means nothing in particular.
            negative_prompt (`str` or `list[str]`, *optional*):
                What the faces should not show. It needs a `prompt` and a `guidance_scale` above 1.
            num_images_per_prompt (`int`, defaults to 1): Number of images for each prompt.
            prompt_embeds (`torch.Tensor` of shape `(num_prompts, text_embed_dim)`, *optional*):
                Embeddings of prompts, instead of `prompt`, such as means of the results of [`encode_prompt`].
            negative_prompt_embeds (`torch.Tensor` of shape `(num_prompts, text_embed_dim)`, *optional*):
                Embeddings, instead of `negative_prompt`.

        Returns:
            [`~diffusers.ImagePipelineOutput`] or `tuple`: `images`, in the form of `output_type`.

        Raises:
            ValueError: An argument is invalid, or the network and the scheduler are incompatible.
        """
        # 0. Check
        if isinstance(batch_size, str | list):
            if prompt is not None:
                raise ValueError("`prompt` is given twice: as the first argument and by its name.")
            batch_size, prompt = None, batch_size
        prompts = self.check_prompts(
            prompt, negative_prompt, num_images_per_prompt, prompt_embeds, negative_prompt_embeds
        )
        if prompts is not None and batch_size is not None:
            raise ValueError(
                f"`batch_size` must be None with prompts, got {batch_size!r}: use `num_images_per_prompt`."
            )
        if batch_size is None:
            batch_size = 1 if prompts is None else prompts * num_images_per_prompt
        scheduler, num_inference_steps, guidance, network = self.resolve_preset(
            preset, num_inference_steps, guidance_scale, autoguidance_scale
        )
        self.check_inputs(
            batch_size,
            num_inference_steps,
            generator,
            latents,
            output_type,
            class_labels,
            callback_on_step_end_tensor_inputs,
            eta,
            guidance,
        )

        # 1. Timesteps. They come before the noise, because some schedulers need them to know their initial scale.
        scheduler.set_timesteps(num_inference_steps)
        step_kwargs = {"generator": generator, "eta": eta}
        step_parameters = inspect.signature(scheduler.step).parameters
        step_kwargs = {name: value for name, value in step_kwargs.items() if name in step_parameters}
        texts = prompt, negative_prompt, prompt_embeds, negative_prompt_embeds
        condition = self._condition(class_labels, prompts or 1, num_images_per_prompt, *texts)

        takes_variance = self._scheduler_is_of(VARIANCE_SCHEDULERS)
        if not takes_variance and "variance_type" in scheduler.config:
            # With a learned variance, diffusers' solvers would cut the output to three channels for any kind of image.
            scheduler.register_to_config(variance_type=None)

        # 2. Noise
        latents = self.prepare_latents(batch_size, generator, latents, scheduler.init_noise_sigma)

        # 3. Denoise
        is_called = calling(self, len(scheduler.timesteps), guidance)
        with is_called, evaluating(self.unet, self.guide, self.student):
            for i, t in enumerate(self.progress_bar(scheduler.timesteps)):
                # 3.1 Predict the noise
                model_input = scheduler.scale_model_input(latents, t)
                model_output = self.predict(model_input, t, condition, guidance, network)
                if not takes_variance:
                    model_output = model_output[:, : latents.shape[1]]

                # 3.2 x_t -> x_t-1
                latents = scheduler.step(model_output, t, latents, **step_kwargs).prev_sample

                if callback_on_step_end is not None:
                    callback_kwargs = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                    latents = (callback_on_step_end(self, i, t, callback_kwargs) or {}).get("latents", latents)

        # 4. Images
        images = self.postprocess(latents, output_type)
        self.maybe_free_model_hooks()

        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)

    @staticmethod
    def postprocess(latents: torch.Tensor, output_type: str = "pil"):
        """Convert x_0 in [-1, 1], of shape `(batch, channels, height, width)`, to images of `output_type`."""
        if output_type == "latent":
            return latents
        images = (latents / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return array if output_type == "np" else DiffusionPipeline.numpy_to_pil(array)


@contextmanager
def _without_empty_warning() -> Iterator[None]:
    """Hide diffusers' warning of modules that must stay in float32 where its list of them is empty."""

    def is_useful(record: Any) -> bool:
        return "should be kept in float32: []" not in record.getMessage()

    source = logging.get_logger("diffusers.models.modeling_utils")
    source.addFilter(is_useful)
    try:
        yield
    finally:
        source.removeFilter(is_useful)


@contextmanager
def calling(pipeline: DDPMFacesPipeline, num_timesteps: int, guidance: Guidance) -> Iterator[None]:
    """Make the properties of `pipeline` return the values of a call, in this thread only."""
    token = _CALLS.set({**_CALLS.get({}), id(pipeline): _Call(num_timesteps, guidance)})
    try:
        yield
    finally:
        _CALLS.reset(token)


# For each network in use: the number of calls, and its modules that were in training mode.
_MODES: dict[torch.nn.Module, tuple[int, list[torch.nn.Module]]] = {}
_MODES_LOCK = threading.Lock()


@contextmanager
def evaluating(*networks: torch.nn.Module | None) -> Iterator[None]:
    """Put networks into evaluation mode, and restore the mode of each of their modules afterwards.

    In training mode, BatchNorm would mix the images of a batch and update its running statistics, and dropout would be
    active. Threads may share a network: the last call that uses it restores the modes.
    """
    present = [network for network in networks if network is not None]
    with _MODES_LOCK:
        for network in present:
            calls, training = _MODES.get(network) or (0, [module for module in network.modules() if module.training])
            _MODES[network] = calls + 1, training
            for module in training:
                module.training = False
    try:
        yield
    finally:
        with _MODES_LOCK:
            for network in present:
                calls, training = _MODES.pop(network)
                if calls > 1:
                    _MODES[network] = calls - 1, training
                    continue
                for module in training:
                    module.training = True


def tokenize(tokenizer: Any, text_encoder: Any, texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Convert texts to `input_ids` and `attention_mask`, each of shape `(num_texts, num_tokens)`.

    The mask leaves out unknown words: the encoder has not learned what to do with them.
    """
    limit = _max_tokens(tokenizer, text_encoder)
    tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
    ids, mask = tokens["input_ids"].long(), tokens["attention_mask"]
    if not ids.numel():  # only empty texts
        ids, mask = ids.new_zeros(len(texts), 1), mask.new_zeros(len(texts), 1)
    if tokenizer.unk_token_id not in (None, tokenizer.eos_token_id):
        mask = mask * (ids != tokenizer.unk_token_id)
    return {"input_ids": ids, "attention_mask": mask}


def pooled(text_encoder: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Encode tokens: CLIP's pooled output, or the mean over all tokens of other encoders.

    Returns:
        `torch.Tensor` of shape `(num_texts, hidden_size)`.
    """
    attention_mask = attention_mask.clone()
    attention_mask[attention_mask.sum(dim=1) == 0, 0] = 1  # attention to nothing would be NaN
    output = text_encoder(input_ids=input_ids, attention_mask=attention_mask)
    if "clip" in text_encoder.config.model_type:  # its pooled output was trained to match images
        return output.pooler_output
    weights = attention_mask[..., None].to(output.last_hidden_state.dtype)
    return (output.last_hidden_state * weights).sum(dim=1) / weights.sum(dim=1)


def prompt_notes(tokenizer: Any, text_encoder: Any, prompts: Sequence[str]) -> list[str]:
    """Describe what the text encoder will not see of the prompts."""
    if not tokenizer.is_fast:  # which knows the places of tokens
        return []
    notes, unknown = [], tokenizer.unk_token_id
    limit = _max_tokens(tokenizer, text_encoder)
    for prompt in dict.fromkeys(prompts):
        tokens = tokenizer(prompt, truncation=True, max_length=limit, return_offsets_mapping=True)
        places = tokens["offset_mapping"]
        rest = prompt[max((end for _, end in places), default=0) :].strip()
        if rest and len(places) == limit:
            notes.append(f"The prompt is too long; this part is cut off: {rest!r}")
        if unknown not in (None, tokenizer.eos_token_id):
            pairs = zip(places, tokens["input_ids"], strict=True)
            words = dict.fromkeys(prompt[start:end] for (start, end), number in pairs if number == unknown)
            if words:
                notes.append(f"The model does not know these words and ignores them: {', '.join(words)}")
    return notes


def _max_tokens(tokenizer: Any, text_encoder: Any) -> int:
    limits = (tokenizer.model_max_length, getattr(text_encoder.config, "max_position_embeddings", None))
    return min(MAX_PROMPT_TOKENS, *(limit for limit in limits if limit))


def convert(network: ModelMixin, dtype: torch.dtype) -> ModelMixin:
    """Convert a network to a dtype and to channels last, in place, and return it."""
    network.to(memory_format=torch.channels_last)
    # The `to` of diffusers' models would warn about modules to keep in float32, although there are none.
    return torch.nn.Module.to(network, dtype)


def fastest_dtype(network: ModelMixin) -> torch.dtype:
    """Return bfloat16 if the device of the network has instructions for it, or else the network's own dtype."""
    return torch.bfloat16 if _has_bf16(network.device) else network.dtype


def _has_bf16(device: torch.device) -> bool:
    """Return whether a device has bfloat16 instructions. CPUs without them emulate them slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # missing in some versions of PyTorch
    return device.type == "cpu" and supported is not None and supported()


def _micro_batch_size_on(sample: torch.Tensor) -> int:
    """Return the number of images that a network takes at once on the device of `sample`."""
    if sample.device.type != "cpu":
        return len(sample)
    # Larger batches are not faster, and need more memory.
    return max(1, MAX_CPU_PIXELS // sample[0, 0].numel())


def _check_scale(name: str, scale: float) -> None:
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not is_number or not 0 <= scale < math.inf:
        raise ValueError(f"`{name}` must be a number of at least 0, got {scale!r}.")


def _image_shape(network: ModelMixin) -> tuple[int, int, int]:
    """(channels, height, width)"""
    size = network.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return network.config.in_channels, height, width


def _publisher() -> ModuleType:
    """Import `ddpm_faces.hub`: the only place where this file depends on the rest of the package.

    `hub` imports this file, and published repositories contain this file without the package. It is therefore imported
    by name, and only for publishing.
    """
    try:
        return importlib.import_module("ddpm_faces.hub")
    except ModuleNotFoundError as error:
        if error.name not in ("ddpm_faces", "ddpm_faces.hub"):
            raise
        raise ImportError(
            "Publishing needs the ddpm-faces package, which is not installed: run `pip install .` in a clone of "
            "its repository. Saving and sampling work without it."
        ) from error


def _is_installed() -> bool:
    """Whether this file belongs to the installed package, and not to a downloaded repository."""
    return __name__ == f"ddpm_faces.{CODE_FILES['DDPMFacesPipeline']}"


def _parts(index: dict[str, Any]) -> dict[str, list]:
    """The entries of `model_index.json` that name a component's library and class."""
    pairs = {k: v for k, v in index.items() if isinstance(v, list) and len(v) == 2 and not k.startswith("_")}
    return {k: v for k, v in pairs.items() if k not in SETTINGS}


def upgraded(index: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a `model_index.json` with the names of the current format."""
    if index.get("_format_version", 1) >= 4:
        return index

    def renamed(settings: dict[str, Any]) -> dict[str, Any]:
        return {{"guidance_scale": "autoguidance_scale"}.get(name, name): value for name, value in settings.items()}

    index = {**renamed(index), "_format_version": FORMAT_VERSION}
    if index.get("presets"):
        index["presets"] = {
            name: renamed(preset) if isinstance(preset, dict) else preset for name, preset in index["presets"].items()
        }
    return index


def _check_index(index: Any, cls: type, json_file: str | os.PathLike) -> None:
    """Refuse a file that is not a `model_index.json` of this class, before anything that it names is loaded."""
    if not isinstance(index, dict):
        raise ValueError(f"{json_file} must contain a JSON object, got {type(index).__name__}.")
    version = index.get("_format_version", 1)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"{json_file} was saved in format {version!r}, by a later version of ddpm-faces; this one reads up to "
            f"{FORMAT_VERSION}. Update the ddpm-faces package."
        )
    allowed = {*inspect.signature(cls).parameters, "auto_map"}
    unknown = sorted(k for k in index if k not in allowed and not k.startswith("_"))
    missing = [name for name in ("unet", "scheduler") if name not in index]
    if unknown or missing:
        raise ValueError(
            f"{json_file} is of another kind of pipeline: it has {', '.join(unknown) or f'no {missing[0]}'}; a "
            f"DDPMFacesPipeline has {', '.join(sorted(allowed - {'auto_map'}))}."
        )
    for name in [name for name in (*MODEL_COMPONENTS, *TEXT_COMPONENTS, "scheduler") if name in index]:
        if not _is_component(name, index[name]):
            raise ValueError(
                f"{json_file}: `{name}` must name a library and a class, one of this package, diffusers' UNet2DModel, "
                "a scheduler of diffusers, or a tokenizer or text encoder of transformers; got "
                f"{index[name]!r}."
            )
    if not isinstance(index.get("weights"), str | None):
        raise ValueError(f"{json_file}: `weights` must be 'ema', 'raw' or nothing, got {index['weights']!r}.")
    presets, default_preset = index.get("presets"), index.get("default_preset")
    if not isinstance(presets, dict | None) or len(presets or {}) > MAX_PRESETS:
        raise ValueError(f"{json_file}: `presets` must be at most {MAX_PRESETS} dictionaries, got {presets!r:.200}.")
    if not isinstance(default_preset, str | None):
        raise ValueError(f"{json_file}: `default_preset` must be a name or nothing, got {default_preset!r:.200}.")
    # The constructor checks `guidance_interval`.
    for name in ("guidance_scale", "autoguidance_scale"):
        if not isinstance(index.get(name, 1.0), int | float):
            raise ValueError(f"{json_file}: `{name}` must be a number, got {index[name]!r}.")


def _is_component(name: str, value: Any) -> bool:
    """Whether an entry of `model_index.json` names a class that may be loaded as this component."""
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(part, str | None) for part in value):
        return False
    library, class_name = value
    if (library, class_name) == (None, None):  # saved without this component, which has to be passed in
        return True
    if name in TEXT_COMPONENTS:
        try:
            transformers = importlib.import_module("transformers")  # takes seconds, and few models need it
        except ImportError as error:
            raise ImportError(
                "This model has a text encoder, which needs transformers: pip install transformers"
            ) from error
        base = transformers.PreTrainedModel if name == "text_encoder" else transformers.PreTrainedTokenizerBase
        found = getattr(transformers, class_name or "", None) if library == "transformers" else None
        return isinstance(found, type) and issubclass(found, base)
    ours, theirs = ("DDPMFacesUNet", "UNet2DModel") if name in MODEL_COMPONENTS else ("DDPMFacesScheduler", None)
    if class_name == ours:
        return library in ("diffusers", CODE_FILES[ours], f"ddpm_faces.{CODE_FILES[ours]}")
    if library != "diffusers" or class_name is None:
        return False
    found = getattr(diffusers, class_name, None)
    is_scheduler = isinstance(found, type) and issubclass(found, SchedulerMixin)
    return class_name == theirs if name in MODEL_COMPONENTS else is_scheduler


def _check_components(index: dict[str, Any], folder: Path) -> None:
    """Refuse configurations of diffusers' components that would exhaust the memory."""
    for name in [name for name in (*MODEL_COMPONENTS, "text_encoder", "scheduler") if name in index]:
        path = folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
        if index[name][1] in (None, *CODE_FILES) or not path.is_file():
            continue
        try:
            config = json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}.") from error
        if not isinstance(config, dict):
            raise ValueError(f"{path} must contain a JSON object, got {type(config).__name__}.")
        for key, value in config.items():
            values = value if isinstance(value, list) else [value]
            is_depth = key in ("layers_per_block", "num_hidden_layers", "num_layers")
            limit = MAX_LAYERS_PER_BLOCK if is_depth else MAX_NUMBER[name]
            if len(values) > (MAX_BLOCKS if name in MODEL_COMPONENTS else limit):
                raise ValueError(f"{path}: `{key}` has {len(values)} entries, which is more than is loaded.")
            if any(isinstance(number, int | float) and not abs(number) <= limit for number in values):
                raise ValueError(f"{path}: `{key}` must be at most {limit}, got {value!r}.")
