"""The number of CPU cores that a process may use."""

import math
import os
from pathlib import Path

import torch


CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")


def available_cores() -> int:
    """Return the number of cores that this process may use, by its affinity and the limit of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, cgroup_limit() or cores))


def cgroup_limit() -> int | None:
    """Return the limit of this process's control group (Docker, Kubernetes, Slurm) in cores, rounded up, if any."""
    limits = []
    try:
        own = next((line.rpartition(":")[2] for line in OWN_GROUP.read_text().splitlines()), "/")
    except OSError:
        return None
    group = CGROUPS / own.strip().lstrip("/")
    for folder in (group, *group.parents):  # limits of parent groups apply too
        if not folder.is_relative_to(CGROUPS):
            break
        limits.append(_quota(folder / "cpu.max"))  # version 2: "QUOTA PERIOD" or "max PERIOD"
    for name in ("cpu", "cpu,cpuacct"):  # version 1
        limits.append(_quota(CGROUPS / name / "cpu.cfs_quota_us", CGROUPS / name / "cpu.cfs_period_us"))
    return min((limit for limit in limits if limit is not None), default=None)


def _quota(*paths: Path) -> int | None:
    try:
        quota, period = (int(word) for word in " ".join(path.read_text() for path in paths).split())
    except (OSError, ValueError):
        return None
    return max(1, math.ceil(quota / period)) if quota > 0 and period > 0 else None


def use_all_cores() -> None:
    """Correct the number of threads that `accelerate launch` sets: one per process, or one per core of the machine.

    The former leaves cores idle. With the latter, threads wait for each other if the process may use fewer cores. A
    user's own choice of one thread cannot be told apart from the former. To keep a process on one core, use `taskset`.
    """
    cores = max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if torch.get_num_threads() == 1 or torch.get_num_threads() > cores:
        torch.set_num_threads(cores)
