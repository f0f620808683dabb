"""What the machine gives to this process: CPU cores, memory and shared memory.

In a container, and under Slurm or Kubernetes, the limits of the control group (cgroup) count, not
the cores and the memory of the whole machine. Versions 1 and 2 of cgroups are read.
"""

import contextlib
import math
import os
import shutil
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")  # one line "number:controllers:path" for each hierarchy
SHARED_MEMORY = Path("/dev/shm")  # through it, worker processes send what they have decoded


def count_cores():
    """Returns the number of CPU cores that this process may use, at least 1."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    # Microseconds of CPU time that the processes may use together, in a period of microseconds.
    quotas = [*read_cgroups("", "cpu.max")]
    quotas += read_cgroups("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")
    for quota, period in quotas:
        if quota not in ("max", "-1"):
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def count_memory():
    """Returns the bytes of memory that this process may use."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [*read_cgroups("", "memory.max"), *read_cgroups("memory", "memory.limit_in_bytes")]
    return min([memory, *(int(limit) for (limit,) in limits if limit != "max")])


def read_cgroups(controller, *names):
    """Reads these files of the cgroup of this process, and of all cgroups above it.

    controller: cpu or memory in version 1, "" in version 2. Yields the words of the files.
    """
    for folder in list_cgroups(controller):
        with contextlib.suppress(OSError):  # no such file: this cgroup sets no limit
            yield " ".join((folder / name).read_text() for name in names).split()


def list_cgroups(controller):
    """Returns the folders of the cgroup of this process, and of all cgroups above it."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            root = CGROUPS / controller
            own = root.joinpath(path.lstrip("/"))
            return [own, *(folder for folder in own.parents if folder.is_relative_to(root))]
    return []


def free_shared_memory():
    """Returns the free bytes of the shared memory; infinity where it has no limit of its own."""
    try:
        return shutil.disk_usage(SHARED_MEMORY).free
    except OSError:  # not Linux
        return math.inf
