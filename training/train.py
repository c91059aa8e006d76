"""Train DDPM on pictures of faces.

$ accelerate launch training/train.py                                          # faces that the program draws
$ accelerate launch training/train.py --train_data_dir my_faces --resolution 64
$ accelerate launch training/train.py --config training/configs/article64.yaml --dataset_name user/faces

All fields of `ddpm_faces.config.TrainingConfig` are flags (`--help`), or keys of the YAML file of `--config`.
"""

import json
import math
import os
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, ProjectConfiguration, set_seed
from diffusers import EMAModel
from diffusers.optimization import get_scheduler
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ddpm_faces import DDPMFacesObjective, DDPMFacesPipeline, DDPMFacesScheduler, DDPMFacesUNet
from ddpm_faces.checkpoint import list_checkpoints, save_checkpoint, save_pipeline
from ddpm_faces.config import TrainingConfig, parse_training_config
from ddpm_faces.data import load_faces, to_samples
from ddpm_faces.plots import image_grid, loss_curve


CONFIG_NAME = "training_config.yaml"


def main(config: TrainingConfig) -> None:
    # 1. Set up
    checkpoint = checkpoint_to_resume(config)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            # An epoch's last batches belong to the next step, not to a smaller one.
            num_steps=config.gradient_accumulation_steps,
            sync_with_dataloader=False,
        ),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=f"{config.output_dir}/logs"),
    )
    if accelerator.device.type == "cpu":
        use_all_cores()
    set_seed(config.seed)
    scheduler = DDPMFacesScheduler(**config.scheduler_config())
    objective = DDPMFacesObjective(scheduler, config.loss_type, config.snr_gamma or None)
    unet = DDPMFacesUNet(**config.unet_config())
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.to(memory_format=torch.channels_last)  # faster convolutions, on the CPU too
    set_seed(config.seed, device_specific=True)  # equal weights on all processes, but each its own noise

    # 2. Data
    with accelerator.main_process_first():  # one process downloads
        dataset = load_faces(
            dataset_name=config.dataset_name,
            train_data_dir=config.train_data_dir,
            resolution=config.resolution,
            channels=config.in_channels,
            dataset_config_name=config.dataset_config_name,
            split=config.dataset_split,
            image_column=config.image_column,
            cache_dir=config.cache_dir,
            num_drawn_images=config.num_drawn_images,
            max_images=config.max_train_samples,
        )
    images_per_batch = config.train_batch_size * accelerator.num_processes
    images_per_step = images_per_batch * config.gradient_accumulation_steps
    if len(dataset) < images_per_batch:
        raise ValueError(
            f"`train_batch_size` {config.train_batch_size} on {accelerator.num_processes} process(es) needs at least "
            f"{images_per_batch} pictures, and the data set has {len(dataset)}."
        )
    dataloader = DataLoader(
        dataset,
        batch_size=config.train_batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=config.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        # Of its own, because each new iterator draws a seed, and a resumed run makes one more of them: from the global
        # generator, all noise after that would be another.
        generator=torch.Generator(),
    )

    # 3. Optimizer, its schedule in optimizer steps, EMA
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )
    max_train_steps = math.ceil(config.max_train_images / images_per_step)
    last_image = max_train_steps * images_per_step
    lr_scheduler = get_scheduler(
        "constant_with_warmup" if config.lr_scheduler == "constant" else config.lr_scheduler,
        optimizer,
        num_warmup_steps=math.ceil(config.lr_warmup_images / images_per_step),
        num_training_steps=max_train_steps,
    )
    unet, optimizer, dataloader = accelerator.prepare(unet, optimizer, dataloader)
    progress = Progress()
    accelerator.register_for_checkpointing(lr_scheduler, progress)
    ema = None
    if config.use_ema:
        decay = 0.5 ** (images_per_step / config.ema_half_life_images)
        ema = EMAModel(accelerator.unwrap_model(unet).parameters(), decay=decay)
        ema.to(accelerator.device)
        accelerator.register_for_checkpointing(ema)

    # 4. Resume
    run = Run(config, accelerator, accelerator.unwrap_model(unet), ema, images_per_step)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        accelerator.print(f"Resumed from {checkpoint} after {progress.images_seen} images.")
    run.start(progress.images_seen)
    num_parameters = sum(parameter.numel() for parameter in unet.parameters())
    accelerator.print(
        f"{len(dataset)} pictures, {num_parameters / 1e6:.1f} M parameters, {images_per_step} images per step, "
        f"{max_train_steps} steps on {accelerator.num_processes} x {accelerator.device.type} "
        f"({torch.get_num_threads()} CPU threads each), precision: {accelerator.mixed_precision}"
    )

    # 5. Train
    steps_per_epoch = len(dataloader)  # batches, of which `gradient_accumulation_steps` make a step
    batches_seen = progress.images_seen // images_per_batch
    bar = tqdm(
        total=last_image,
        initial=progress.images_seen,
        unit="img",
        desc="Training",
        disable=not accelerator.is_local_main_process,
    )
    loss_sum, num_losses = torch.zeros((), device=accelerator.device), 0
    while progress.images_seen < last_image:
        epoch, first_batch = divmod(batches_seen, steps_per_epoch)
        dataloader.set_epoch(epoch)
        for batch in skip_first_batches(dataloader, first_batch) if first_batch else dataloader:
            batches_seen += 1
            with accelerator.accumulate(unet):
                samples = to_samples(batch["images"], random_flip=config.random_flip)
                losses, _ = objective(unet, samples)  # noise, predict, compare
                accelerator.backward(losses.mean())
                if accelerator.sync_gradients and config.max_grad_norm > 0:
                    accelerator.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            loss_sum, num_losses = loss_sum + losses.detach().mean(), num_losses + 1
            if not accelerator.sync_gradients:
                continue

            lr_scheduler.step()
            if ema is not None:
                ema.step(accelerator.unwrap_model(unet).parameters())
            progress.images_seen += images_per_step
            bar.update(images_per_step)

            is_last = progress.images_seen >= last_image
            if run.is_due(config.log_every_images, progress.images_seen) or is_last:
                loss = accelerator.reduce(loss_sum / num_losses, reduction="mean").item()
                loss_sum, num_losses = torch.zeros_like(loss_sum), 0
                run.log(progress.images_seen, epoch, loss, lr_scheduler.get_last_lr()[0])
                bar.set_postfix(loss=f"{loss:.4f}", epoch=epoch)
            if run.is_due(config.sample_every_images, progress.images_seen) and not is_last:  # `finish` draws the last
                run.sample(progress.images_seen, config.sample_inference_steps)
            if config.checkpoint_every_images and (
                run.is_due(config.checkpoint_every_images, progress.images_seen) or is_last
            ):
                run.checkpoint(progress.images_seen)
            if is_last:
                break
    bar.close()

    # 6. Finish
    run.finish(progress.images_seen)
    accelerator.end_training()


def use_all_cores() -> None:
    """Undo `accelerate launch`'s single thread per process, which leaves the other cores of a CPU idle.

    One thread that a user asked for looks the same from here: to keep a process on one core, use `taskset`.
    """
    if torch.get_num_threads() == 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def checkpoint_to_resume(config: TrainingConfig) -> Path | None:
    """The newest checkpoint in `output_dir`, if there is one.

    Raises:
        ValueError: It is of another network or schedule, or of one unknown, or the run is not to be resumed.
    """
    checkpoints = list_checkpoints(config.output_dir)
    if not checkpoints:
        return None
    if config.resume == "never":
        raise ValueError(
            f"`output_dir` {config.output_dir!r} holds checkpoints of an earlier run, which `resume=never` would "
            "overwrite: choose another folder, or delete them."
        )
    saved_config = Path(config.output_dir, CONFIG_NAME)
    if not saved_config.is_file():
        raise ValueError(
            f"`output_dir` {config.output_dir!r} holds checkpoints but no {CONFIG_NAME}, which says of what model: "
            "choose another folder, or put the file back."
        )
    saved = TrainingConfig(**yaml.safe_load(saved_config.read_text()))
    then, now = ({**c.unet_config(), **c.scheduler_config()} for c in (saved, config))
    changed = [f"{name}: {then[name]} there, {now[name]} now" for name in now if then[name] != now[name]]
    if changed:
        raise ValueError(
            f"`output_dir` {config.output_dir!r} holds a run of another model ({'; '.join(changed)}): choose another "
            "folder, or delete its checkpoints."
        )
    return checkpoints[-1]


class Progress:
    """How far the run has come; saved with each checkpoint."""

    def __init__(self) -> None:
        self.images_seen = 0

    def state_dict(self) -> dict[str, int]:
        return {"images_seen": self.images_seen}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.images_seen = state_dict["images_seen"]


class Run:
    """What happens beside the loop: the log, the sample grids, the checkpoints, the finished pipeline."""

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        unet: DDPMFacesUNet,
        ema: EMAModel | None,
        images_per_step: int,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.unet = unet
        self.ema = ema
        self.images_per_step = images_per_step
        self.output_dir = Path(config.output_dir)
        self.log_path = self.output_dir / "log.jsonl"

    def is_due(self, every_images: int, images_seen: int) -> bool:
        """Whether the last step passed a multiple of `every_images`; 0 is never."""
        return every_images > 0 and images_seen // every_images > (images_seen - self.images_per_step) // every_images

    def start(self, images_seen: int) -> None:
        """Open the log, less what a run that was interrupted wrote after its last checkpoint."""
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self.config.save(self.output_dir / CONFIG_NAME)
            entries = [entry for entry in self.read_log() if entry["images_seen"] <= images_seen]
            self.log_path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        hyperparameters = {k: v if isinstance(v, (int, float)) else str(v) for k, v in asdict(self.config).items()}
        self.accelerator.init_trackers("training", config=hyperparameters)
        self._restart_clock(images_seen)

    def read_log(self) -> list[dict]:
        return [json.loads(line) for line in self.log_path.read_text().splitlines()] if self.log_path.exists() else []

    def log(self, images_seen: int, epoch: int, loss: float, learning_rate: float) -> None:
        seconds = time.perf_counter() - self._clock_start
        speed = (images_seen - self._clock_images) / seconds
        values = {"loss": loss, "learning_rate": learning_rate, "images_per_second": speed, "epoch": epoch}
        self.accelerator.log(values, step=images_seen)
        if self.accelerator.is_main_process:
            with self.log_path.open("a") as file:
                file.write(json.dumps({"images_seen": images_seen, **values}) + "\n")
        self._restart_clock(images_seen)

    def sample(self, images_seen: int, num_inference_steps: int | None) -> Image.Image | None:
        """Draw the grid of the run's fixed seeds, on the main process; training's random state is not touched."""
        grid = None
        if self.accelerator.is_main_process:
            generators = [torch.Generator().manual_seed(self.config.seed + i) for i in range(self.config.num_samples)]
            with self.weights_to_use():
                pipeline = self.pipeline()
                pipeline.set_progress_bar_config(desc="Sampling", leave=False)
                images = pipeline(len(generators), num_inference_steps, generators).images
            grid = image_grid(images, scale=max(1, 128 // self.config.resolution))
            folder = self.output_dir / "samples"
            folder.mkdir(exist_ok=True)
            grid.save(folder / f"{images_seen:010d}.png")
            if self.config.report_to == "tensorboard":
                writer = self.accelerator.get_tracker("tensorboard", unwrap=True)
                writer.add_image("samples", np.asarray(grid), images_seen, dataformats="HWC")
        self.accelerator.wait_for_everyone()
        self._restart_clock(images_seen)
        return grid

    def checkpoint(self, images_seen: int) -> None:
        save_checkpoint(self.accelerator, self.output_dir, images_seen, self.config.checkpoints_total_limit)
        self._restart_clock(images_seen)

    def finish(self, images_seen: int) -> None:
        """Save the pipeline, and beside it a grid of samples in all T steps and the loss curve."""
        grid = self.sample(images_seen, num_inference_steps=None)
        if self.accelerator.is_main_process:
            with self.weights_to_use():
                save_pipeline(self.pipeline(), self.output_dir)
            grid.save(self.output_dir / "samples.png")
            log = self.read_log()
            if log:
                losses = [entry["loss"] for entry in log]
                loss_curve([entry["images_seen"] for entry in log], losses, self.output_dir / "loss_curve.png")
            print(f"The pipeline is in {self.output_dir}, pictures from it in {self.output_dir / 'samples.png'}")
        self.accelerator.wait_for_everyone()

    def pipeline(self) -> DDPMFacesPipeline:
        return DDPMFacesPipeline(self.unet, DDPMFacesScheduler(**self.config.scheduler_config()))

    @contextmanager
    def weights_to_use(self):
        """The network in evaluation mode, with the averaged weights where there are some, for as long as it lasts."""
        self.unet.eval()
        if self.ema is not None:
            self.ema.store(self.unet.parameters())
            self.ema.copy_to(self.unet.parameters())
        try:
            yield
        finally:
            if self.ema is not None:
                self.ema.restore(self.unet.parameters())
            self.unet.train()

    def _restart_clock(self, images_seen: int) -> None:
        self._clock_start, self._clock_images = time.perf_counter(), images_seen


if __name__ == "__main__":
    main(parse_training_config())
