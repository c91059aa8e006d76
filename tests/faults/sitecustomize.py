"""Faults for training/train.py. Python imports this file first if its folder is on PYTHONPATH.

FAULTS contains a JSON dictionary that maps the name of a fault to the number of images seen at which it strikes, and
to options.
"""

import json
import os
import signal
import sys


def strike(fault: dict) -> None:
    """Send the signal of the fault to this process, or to its launcher."""
    target = {"self": os.getpid, "launcher": os.getppid}[fault.get("target", "self")]()
    os.kill(target, getattr(signal, fault.get("signal", "SIGKILL")))
    while fault.get("target") == "launcher" and os.getppid() == target:  # it is not dead at once
        pass


def install(faults: dict) -> None:
    import torch

    from ddpm_faces import objective
    from ddpm_faces.data import batches
    from ddpm_faces.training import batch, checkpoint, guard, preemption, saving, setup

    rank = int(os.environ.get("RANK", 0))
    seen = {"images": 0}

    original_step = guard.GradientGuard.step

    def step(self, grad_norm):
        """Strike in the middle of a step: after the gradient, before the update of the weights."""
        fault = faults.get("in_step", {})
        if seen["images"] == fault.get("at") and rank == fault.get("rank", rank):
            strike(fault)
        return original_step(self, grad_norm)

    guard.GradientGuard.step = step

    original_draw = batch.draw_step

    def draw_step(seed, images_seen, *args, **kwargs):
        seen["images"] = images_seen
        return original_draw(seed, images_seen, *args, **kwargs)

    batch.draw_step = draw_step

    if "nan" in faults:
        original_call = objective.DDPMFacesObjective.__call__

        def call(self, *args, **kwargs):
            output = original_call(self, *args, **kwargs)
            fault = faults["nan"]
            if (
                torch.is_grad_enabled()
                and fault["from"] <= seen["images"] < fault["to"]
                and rank == fault.get("rank", 0)
            ):
                losses = output.losses.clone()
                losses[fault.get("picture", 0)] *= float("nan")
                output = output._replace(losses=losses)
            return output

        objective.DDPMFacesObjective.__call__ = call

    if "in_save" in faults:
        fault = faults["in_save"]
        module, attribute = {
            "before_commit": (checkpoint, "commit"),
            "before_prune": (saving, "prune_checkpoints"),
            "before_state": (checkpoint, "_write_json"),
        }[fault["stage"]]
        original = getattr(module, attribute)

        def dying(path, *args, **kwargs):
            if seen["images"] == fault["at"] - fault["step"]:  # the save after this step
                strike(fault)
            return original(path, *args, **kwargs)

        setattr(module, attribute, dying)

    if "disk_full" in faults:
        import resource

        fault = faults["disk_full"]
        original_save = checkpoint.CheckpointIO.save

        def save(self, path, state, guide=None):
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            if fault["from"] <= state.images_seen < fault["to"]:
                resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], hard))
            try:
                original_save(self, path, state, guide)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        checkpoint.CheckpointIO.save = save

    if "worker" in faults:
        fault = faults["worker"]
        original_fetch = batches._Fetch.__getitem__

        def fetch(self, request):
            marker = fault["marker"]
            if not os.path.exists(marker) or fault.get("always"):
                open(marker, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            return original_fetch(self, request)

        batches._Fetch.__getitem__ = fetch

    if "copies" in faults:
        from ddpm_faces.evaluation import copies as audit

        original_audit = audit.audit

        def planted(samples, train, held_out):
            if seen["images"] >= faults["copies"]["from"]:
                samples = torch.cat([train[:20], samples[20:]])
            return original_audit(samples, train, held_out)

        audit.audit = planted

    if "last_grid" in faults:
        from ddpm_faces.training import finish

        original_share = finish.draw_share

        def draw_share(*args, **kwargs):
            if rank == faults["last_grid"].get("rank", rank):
                raise ZeroDivisionError
            return original_share(*args, **kwargs)

        finish.draw_share = draw_share

    if "lock_timeout" in faults:
        original_acquire = setup.FileLock.acquire

        def acquire(self, timeout=None, **kwargs):
            return original_acquire(self, timeout=faults["lock_timeout"], **kwargs)

        setup.FileLock.acquire = acquire

    if "fsdp" in faults:  # accelerate starts this with accelerators only
        from accelerate.state import AcceleratorState, PartialState
        from accelerate.utils import DistributedType

        original_init = AcceleratorState.__init__

        def init(self, *args, fsdp_plugin=None, **kwargs):
            original_init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
            if fsdp_plugin is not None:
                self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
                PartialState._shared_state["distributed_type"] = DistributedType.FSDP

        AcceleratorState.__init__ = init

    if "age_minutes" in faults:
        import time

        preemption._process_start = lambda: time.time() - 60 * faults["age_minutes"]


if os.environ.get("FAULTS") and any(argument.endswith(("train.py", "distill.py")) for argument in sys.orig_argv[1:3]):
    install(json.loads(os.environ["FAULTS"]))
