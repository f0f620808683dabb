"""Decodes images in worker processes, while the network computes features."""

import os
import signal
import sys

from torch.utils.data import DataLoader, Subset

from cxr.errors import Failure, warn
from cxr.machine import SHARED_MEMORY, count_cores, free_shared_memory

PREFETCH = 4  # batches that each worker may decode ahead
HELD = 3  # batches in the shared memory that the main process may hold at the same time


def load_batches(views, batch_size, workers, device):
    """Yields all batches of a dataset in order. Worker processes decode them.

    views: a dataset whose item i is (i, tensor, text), with the property `item_bytes`; batch_size:
    items per batch; workers: of --workers. If the shared memory is full, the rest is decoded in
    this process, and a warning says so. Raises Failure if the processes cannot start.
    """
    n_done = 0
    n_workers, prefetch = plan_workers(views, batch_size, workers, device)
    try:
        for batch in start_loader(views, batch_size, n_workers, prefetch, device):
            n_done += len(batch[0])
            yield batch
        return
    except RuntimeError as error:
        if "shared memory" not in str(error) or not n_workers:
            raise
    warn_of_shared_memory(0)
    rest = Subset(views, range(n_done, len(views)))
    yield from start_loader(rest, batch_size, 0, None, device)


def plan_workers(views, batch_size, workers, device):
    """Returns (number of worker processes, batches that each of them decodes ahead).

    What the workers send must fit into the shared memory, otherwise a worker fails. A container of
    Docker or Kubernetes has only 64 MB of it, unless it is started with another size.
    """
    wanted = count_workers(workers, len(views), device)
    if wanted == 0:
        return 0, None
    n_fitting = free_shared_memory() // (batch_size * views.item_bytes) - HELD
    n_workers = int(max(0, min(wanted, n_fitting)))
    if n_workers < wanted:
        warn_of_shared_memory(n_workers)
    if n_workers == 0:
        return 0, None
    return n_workers, int(min(PREFETCH, n_fitting // n_workers))


def warn_of_shared_memory(n_workers):
    """Warns that only so many worker processes decode images, because of the shared memory."""
    free = free_shared_memory() / 1e6
    processes = "one process" if n_workers == 0 else f"{n_workers} worker processes"
    warn(
        f"{SHARED_MEMORY} has only {free:.0f} MB free, so images are decoded in {processes}; "
        "in a container, `docker run --shm-size=2g` is faster"
    )


def count_workers(workers, n_images, device):
    """Returns the number of worker processes for --workers; -1 means that it is chosen here."""
    if workers >= 0:
        return workers
    cores = count_cores()
    # Few images are decoded sooner than processes start. On two CPU cores, workers slow the
    # network down: 9.7 ms per view with workers, 8.9 ms without (measured).
    if n_images < 200 or (device.type == "cpu" and cores <= 2):
        return 0
    return cores


def start_loader(views, batch_size, n_workers, prefetch, device):
    """Starts the worker processes. Returns an iterator over the batches.

    Raises Failure if the processes cannot start.
    """
    loader = DataLoader(
        views,
        batch_size=batch_size,
        pin_memory=device.type == "cuda",
        num_workers=n_workers,
        worker_init_fn=leave_ctrl_c_to_main,
        timeout=120 if n_workers else 0,  # seconds after which a hanging worker is an error
        prefetch_factor=prefetch,
    )
    try:
        return iter(loader)
    except OSError as error:  # no processes, semaphores or memory left
        message = f"the processes that decode images cannot start ({error})"
        raise Failure(f"{message}; use --workers 0 (make: WORKERS=0)", 4) from error


def leave_ctrl_c_to_main(_):
    """Makes a worker ignore Ctrl-C and a lost connection: the main process ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sys.stderr = open(os.devnull, "w")  # a thread of multiprocessing would print a traceback
