"""The tasks that are due after a step."""

from dataclasses import dataclass

from .config import TrainingConfig


@dataclass(frozen=True)
class Due:
    """The tasks that are due after a step, each a `bool`."""

    log: bool
    guide: bool
    validate: bool
    sample: bool
    evaluate: bool
    audit: bool
    save: bool
    is_last: bool


def due_after(config: TrainingConfig, images_seen: int, has_held_out: bool) -> Due:
    """Return the tasks that are due after the step that ended at `images_seen` images.

    Args:
        config ([`TrainingConfig`]): The configuration with the intervals `..._every_images`.
        images_seen (`int`): Images trained on so far.
        has_held_out (`bool`): Whether there are held-out images.
    """
    is_last = images_seen >= config.max_train_steps * config.train_batch_size

    def reached(count: int) -> bool:
        """Whether this step reached `count` images."""
        return images_seen - config.train_batch_size < count <= images_seen

    def every(count: int) -> bool:
        return count > 0 and reached(images_seen // count * count)

    return Due(
        log=every(config.log_every_images) or is_last,
        guide=config.guide_after_images is not None and reached(config.guide_after_images),
        validate=has_held_out and (every(config.validate_every_images) or is_last),
        sample=every(config.sample_every_images) and not is_last,  # `finish` draws the last grid
        evaluate=config.evaluate_every_images > 0 and (every(config.evaluate_every_images) or is_last),
        audit=config.audit_every_images > 0 and (every(config.audit_every_images) or is_last),
        save=config.checkpoint_every_images > 0 and (every(config.checkpoint_every_images) or is_last),
        is_last=is_last,
    )
