"""How many CPU cores a process may use."""

import math
import os
from pathlib import Path

import torch


CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")


def available_cores() -> int:
    """The cores that this process may use: its affinity, and the limit of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, cgroup_limit() or cores))


def cgroup_limit() -> int | None:
    """The limit of this process's control group (Docker, Kubernetes, Slurm) in cores, rounded up, if there is one."""
    limits = []
    try:
        own = next((line.rpartition(":")[2] for line in OWN_GROUP.read_text().splitlines()), "/")
    except OSError:
        return None
    group = CGROUPS / own.strip().lstrip("/")
    for folder in (group, *group.parents):  # a limit of a parent group holds as well
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
    """Undo the thread counts of `accelerate launch`: one for each process, or as many as the machine has cores.

    The former leaves cores idle; the latter wait for one another where the process may use fewer. One thread that a
    user asked for looks the same from here: to keep a process on one core, use `taskset`.
    """
    cores = max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if torch.get_num_threads() == 1 or torch.get_num_threads() > cores:
        torch.set_num_threads(cores)
