"""The training objective: the simple loss of DDPM, eq. 14 (https://huggingface.co/papers/2006.11239)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .variational_bound import bound_terms


LOSSES = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}


class ObjectiveOutput(NamedTuple):
    """Output of `DDPMFacesObjective`.

    Args:
        losses (`torch.Tensor` of shape `(batch,)`, `torch.float32`): Mean loss over each image.
        timesteps (`torch.Tensor` of shape `(batch,)`, `torch.int64`): The timestep of each image.
    """

    losses: torch.Tensor
    timesteps: torch.Tensor


class DDPMFacesObjective:
    """Training objective: add noise to images at random timesteps and measure the error of the network's prediction.

    Everything except the network runs in float32. In bfloat16, the first timesteps would get no noise at all.

    Args:
        scheduler ([`DDPMFacesScheduler`] or [`~diffusers.DDPMScheduler`]):
            Its `prediction_type` defines the prediction: `"epsilon"` (the noise, as in the article), `"sample"`
            (x_0) or `"v_prediction"` (the velocity). With the `variance_type` `"learned_range"`, the network predicts
            the variance too.
        loss_type (`str`, defaults to `"l2"`): `"l2"` (DDPM, the article), `"l1"` or `"huber"`.
        snr_gamma (`float`, *optional*):
            Weight the squared error of x_0 by min(SNR, `snr_gamma`), with SNR = alpha_bar_t / (1 - alpha_bar_t),
            for any prediction type (Min-SNR, section 3.4 of https://huggingface.co/papers/2303.09556, which uses
            5). With `inf`, the loss is the squared error of the noise, as in the article, for each prediction type. By
            default, the loss is the unweighted error of the prediction.
        snr_floor (`float`, defaults to 0.0):
            Weight it by at least this, max(`snr_floor`, min(SNR, `snr_gamma`)). With 1, errors at high noise, where
            a condition says most, count as much as others (truncated SNR, section 4 of
            https://huggingface.co/papers/2202.00512).
        bound_weight (`float`, defaults to 0.001):
            Weight of the variational bound, in bits per dimension. It is added to the loss if the variance is learned,
            and trains the variance only (hybrid loss of Improved DDPM, eq. 16 of
            https://huggingface.co/papers/2102.09672).

    Raises:
        ValueError: `loss_type` is unknown; `snr_gamma` is not positive, or the loss is not `"l2"`; `snr_floor` is not
            from 0 to `snr_gamma`, or the prediction is the noise; `bound_weight` is negative; or the scheduler has the
            `variance_type` `"learned"` (nothing would keep the variance positive), or `"learned_range"` but is not a
            [`DDPMFacesScheduler`].
    """

    def __init__(
        self,
        scheduler,
        loss_type: str = "l2",
        snr_gamma: float | None = None,
        bound_weight: float = 0.001,
        snr_floor: float = 0.0,
    ) -> None:
        if loss_type not in LOSSES:
            raise ValueError(f"`loss_type` must be one of {', '.join(map(repr, LOSSES))}, got {loss_type!r}.")
        if scheduler.config.variance_type == "learned":
            raise ValueError(
                "`variance_type` must not be 'learned' in training, where nothing keeps it positive: use "
                "'learned_range', 'fixed_small' or 'fixed_large'."
            )
        if scheduler.config.variance_type == "learned_range" and not hasattr(scheduler, "predict_original_sample"):
            raise ValueError(
                f"`scheduler` must be a DDPMFacesScheduler for a learned variance, got {type(scheduler).__name__}."
            )
        if not 0 <= bound_weight < math.inf:
            raise ValueError(f"`bound_weight` must be at least 0 and finite, got {bound_weight}.")
        if snr_gamma is not None and not snr_gamma > 0:
            raise ValueError(f"`snr_gamma` must be positive or None, got {snr_gamma}.")
        if snr_gamma is not None and loss_type != "l2":
            raise ValueError(f"`snr_gamma` needs the `loss_type` 'l2', got {loss_type!r}.")
        if not (snr_floor == 0 or 0 <= snr_floor <= (snr_gamma or 0) and snr_floor < math.inf):
            raise ValueError(
                f"`snr_floor` must be 0, or at most `snr_gamma` ({snr_gamma}) and finite, got {snr_floor}."
            )
        if snr_floor and scheduler.config.prediction_type == "epsilon":
            raise ValueError(f"`snr_floor` must be 0 for the `prediction_type` 'epsilon', got {snr_floor}.")
        self.scheduler = scheduler
        self.bound_weight = bound_weight
        self.loss_fn = LOSSES[loss_type]
        self.weights = None if snr_gamma is None else self._snr_weights(snr_gamma, snr_floor)

    def __call__(
        self,
        unet: Callable,
        original_samples: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        timesteps: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
        condition: dict[str, torch.Tensor] | None = None,
    ) -> ObjectiveOutput:
        """Evaluate the objective on one batch, like the article's `get_loss`.

        Args:
            unet (`Callable`): The network, `unet(sample, timesteps, ...)`, which returns an output with `.sample`.
            original_samples (`torch.Tensor` of shape `(batch, channels, height, width)`, float32): x_0 in [-1, 1].
            class_labels (`torch.Tensor` of shape `(batch,)`, *optional*): For a network with classes.
            generator (`torch.Generator`, *optional*): Source of timesteps and noise, on the device of the images.
            timesteps (`torch.Tensor` of shape `(batch,)`, `torch.int64`, *optional*): Timesteps; drawn by default.
            noise (`torch.Tensor` of the shape of the images, *optional*): Standard normal noise; drawn by default.
            augment_labels (`torch.Tensor` of shape `(batch, augment_dim)`, *optional*):
                How each image was augmented, for a network with an `augment_dim`.
            condition (`dict[str, torch.Tensor]`, *optional*): Further arguments of the network.

        Returns:
            [`ObjectiveOutput`]: Loss and timestep of each image.
        """
        batch_size, device = original_samples.shape[0], original_samples.device

        # 1. t ~ U{0..T-1}, eps ~ N(0, I)
        if timesteps is None:
            num_train_timesteps = self.scheduler.config.num_train_timesteps
            timesteps = torch.randint(num_train_timesteps, (batch_size,), generator=generator, device=device)
        if noise is None:
            noise = torch.randn(original_samples.shape, generator=generator, device=device)

        # 2. x_t
        noisy_samples = self.scheduler.add_noise(original_samples, noise, timesteps)

        # 3. Predict
        labels = {"class_labels": class_labels, "augment_labels": augment_labels}
        model_kwargs = {name: value for name, value in labels.items() if value is not None} | (condition or {})
        prediction = unet(noisy_samples, timesteps, **model_kwargs).sample.float()
        predicted_variance = None
        if self.scheduler.config.variance_type == "learned_range":
            prediction, predicted_variance = prediction.chunk(2, dim=1)

        # 4. Compare
        target = self._target(original_samples, noise, timesteps)
        losses = self.loss_fn(prediction, target, reduction="none").flatten(start_dim=1).mean(dim=1)
        if self.weights is not None:
            self.weights = self.weights.to(device)
            losses = losses * self.weights[timesteps]
        if predicted_variance is not None and self.bound_weight:
            # The bound is T times its mean term. It does not train the prediction.
            output = torch.cat([prediction.detach(), predicted_variance], dim=1)
            terms = bound_terms(self.scheduler, output, original_samples, noisy_samples, timesteps)
            losses = losses + self.bound_weight * self.scheduler.config.num_train_timesteps * terms
        return ObjectiveOutput(losses, timesteps)

    def _target(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        prediction_type = self.scheduler.config.prediction_type
        if prediction_type == "epsilon":
            return noise
        if prediction_type == "sample":
            return original_samples
        return self.scheduler.get_velocity(original_samples, noise, timesteps)

    def _snr_weights(self, snr_gamma: float, snr_floor: float) -> torch.Tensor:
        """Return max(floor, min(SNR, gamma)) / w, of shape `(T,)`, where the unweighted loss weights x_0 by w."""
        alphas_cumprod = self.scheduler.alphas_cumprod.double()
        # max(floor, min(SNR, gamma)) (1 - alpha_bar), without a division by 0. fmin ignores the NaN of `inf * 0`.
        capped = torch.fmin(alphas_cumprod, snr_gamma * (1 - alphas_cumprod))
        capped = capped.maximum(snr_floor * (1 - alphas_cumprod))
        weights = {
            "epsilon": torch.where(alphas_cumprod > 0, capped / alphas_cumprod, 1.0),  # w = SNR, without a floor
            "sample": (alphas_cumprod / (1 - alphas_cumprod)).clamp(snr_floor, snr_gamma),  # w = 1
            "v_prediction": capped,  # w = SNR + 1
        }
        return weights[self.scheduler.config.prediction_type].float()
