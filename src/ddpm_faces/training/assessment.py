"""Measurements during training: the held-out loss, the quality of samples, and copies of training images."""

import math
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list

from ..data.dataset import FaceDataset
from ..evaluation.held_out import bin_names, held_out_losses
from ..files import replacing
from .samples import draw_samples
from .text import first_captions


if TYPE_CHECKING:
    from .run import Run


def validate(run: "Run") -> bool:
    """Measure the held-out loss of the EMA weights; return whether it is the best so far."""
    by_bin = _held_out_loss(run)
    loss = sum(by_bin) / len(by_bin)
    names = bin_names(run.config.num_train_timesteps)
    entry = {"held_out_loss": loss, "held_out_loss_by_timestep": dict(zip(names, by_bin, strict=True))}
    if run.text is not None:
        without = _held_out_loss(run, is_prompted=False)
        entry["held_out_loss_without_captions"] = sum(without) / len(without)
    run.log.write(entry)
    state = run.state
    is_best = math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss)
    if is_best:
        state.best_loss, state.best_images_seen, state.validations_since_best = loss, state.images_seen, 0
    else:
        state.validations_since_best += 1
    return is_best


def _held_out_loss(run: "Run", is_prompted: bool = True) -> list[float]:
    """Return the held-out loss in each timestep bin, with or without the captions of a model that has them."""

    def condition(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        if run.text is None:
            return {}
        captions = first_captions(batch["captions"])
        return run.text.batch(captions, torch.full((len(captions),), is_prompted), run.accelerator.device)

    with run.steps.paused(), run.evaluating() as unet:
        losses = held_out_losses(run.accelerator, unet, run.objective, _held_out(run), run.micro_batch_size, condition)
    return losses.mean(dim=0).tolist()


def _held_out(run: "Run") -> FaceDataset:
    if run.data.held_out is None:
        raise ValueError("No images are held out to compare with: `num_validation_images` or `validation_split`.")
    return run.data.held_out


class Assessment:
    """Evaluates samples against the held-out images, and searches them for copies of training images.

    The features of the held-out images are computed once.
    """

    def __init__(self) -> None:
        self._reference: tuple | None = None

    def __call__(self, run: "Run", evaluates: bool, audits: bool) -> bool:
        """Run the evaluation and the audit if they are due; return whether an audit found no copies.

        Args:
            run ([`Run`]): The run that generates the samples.
            evaluates (`bool`): Whether to evaluate them.
            audits (`bool`): Whether to search them for copies.
        """
        if not (evaluates or audits):
            return False
        with run.steps.paused():
            drawn = draw_samples(run, num_samples=run.config.num_evaluation_samples)
            samples = ((drawn.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            if evaluates:
                self._evaluate(run, samples.expand(-1, 3, -1, -1))
            return audits and _audit(run, samples)

    def _evaluate(self, run: "Run", samples: torch.Tensor) -> None:
        from ..evaluation.extractors import MobileNetV2
        from ..evaluation.measurements import MetricNetworks, measure
        from ..evaluation.quality import compare
        from ..evaluation.samples import select

        if self._reference is None:
            networks = MetricNetworks(run.accelerator.device, [MobileNetV2(run.accelerator.device)])
            held_out = _held_out(run).images.expand(-1, 3, -1, -1)
            self._reference = networks, measure(select(held_out), len(held_out), networks, run.micro_batch_size)
        networks, reference = self._reference
        measured = measure(select(samples), len(samples), networks, run.micro_batch_size)
        metrics = compare(measured, reference, networks)
        run.log.write({"evaluation": {metric["type"]: metric["value"] for metric in metrics}})


def _audit(run: "Run", samples: torch.Tensor) -> bool:
    from ..evaluation.copies import audit, closest_pairs_picture

    outcome: list[Any] = [None]
    if run.accelerator.is_main_process:
        train, held_out = run.data.batches.dataset.images, _held_out(run).images
        report = audit(samples, train, held_out)
        (pixels,) = report.spaces
        outcome = [(report.found_copies, report.verdict, pixels.copy_rate, pixels.held_out_copy_rate)]
        folder = run.output_dir / "audits"
        folder.mkdir(exist_ok=True)
        with replacing(folder / f"{run.state.images_seen:010d}.png") as path:
            closest_pairs_picture(report, samples, train, held_out).save(path, "PNG")
    found, verdict, copy_rate, held_out_copy_rate = broadcast_object_list(outcome)[0]
    run.log.write({"copy_rate": copy_rate, "held_out_copy_rate": held_out_copy_rate, "copies_found": float(found)})
    run.state.audits.append({"images_seen": run.state.images_seen, "found_copies": found, "verdict": verdict})
    return not found
