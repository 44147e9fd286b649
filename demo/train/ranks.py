"""Data-parallel training in several single-threaded processes on one machine.

Two processes of one thread each use two cores better than one process of two threads on tensors this small.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn


def _enter(rank: int, size: int, meeting: str, job: Callable[[Any], None], plan: Any) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    try:
        job(plan)
    finally:
        distributed.destroy_process_group()


def launch(job: Callable[[Any], None], plan: Any, size: int) -> None:
    """Run ``job(plan)`` in ``size`` processes that can ``mean_gradients``; with one, run it here."""
    if size == 1:
        torch.set_num_threads(1)
        job(plan)
        return
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_enter, (size, str(Path(folder) / "meeting"), job, plan), nprocs=size)


def rank() -> int:
    """Return this process's number, 0 when alone. Process 0 writes logs and states."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def size() -> int:
    """Return the number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def generator(seed: int, step: int) -> torch.Generator:
    """Return this process's random generator for one step: the same after a resume, different between processes."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 16 + rank())


def mean_gradients(module: nn.Module) -> None:
    """Replace every gradient by its mean over the processes; a parameter without gradient stays so everywhere."""
    if size() == 1:
        return
    gradients: list[Tensor] = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
