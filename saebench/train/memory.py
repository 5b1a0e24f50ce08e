"""What a grid of SAEs takes of its device's memory: said before the first step, and refused where it does not fit.

All SAEs are there throughout, with the moments of their optimizers; gradients and what a step works with are those of one at a time.
"""

import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from saebench.sae.sparse import rows_of_a_block
from saebench.train.gradients import Kin, rows_at_once
from saebench.train.member import DENSE_ABOVE, ROOM
from saebench.train.muon import RANK
from saebench.train.objectives import prefixes
from saebench.train.recipes import EDITIONS, RECIPES
from saebench.train.spec import Spec

log = logging.getLogger(__name__)

_DENSE_ARRAYS = 10  # of pre-activations' size that a step with all latents holds at once (measured: 7 to 9)
_ENTRY_BYTES = 100  # of an active pair: its latent, values, places when sorted (measured: 60 to 100)
_ROW_ARRAYS = 8  # of a batch's size: rows as they came, inputs, reconstructions, errors


class Need(NamedTuple):
    """Bytes that an SAE takes."""

    weights: int
    moments: int
    gradients: int
    """during its step, as the next"""
    scratch: int

    @property
    def held(self) -> int:
        return self.weights + self.moments

    @property
    def passing(self) -> int:
        return self.gradients + self.scratch


def need_of(spec: Spec, d_in: int, batch: int, device: torch.device) -> Need:
    """An estimate from above of what training an SAE takes; where other vectors are written than read, `d_in` is the mean of both widths."""
    rule = RECIPES[spec.architecture].gradients
    matrix = spec.d_sae * d_in * 4
    weights = 2 * matrix + 5 * spec.d_sae * 4 + spec.skip * d_in**2 * 4
    rows = min(rows_of_a_block(spec.d_sae, device), batch)
    scratch = rows * spec.d_sae * 4 + matrix + _ROW_ARRAYS * batch * d_in * 4
    if device.type == "cuda":
        scratch += matrix // 2 + rows * spec.d_sae * 2  # selection, and what is rounded to bfloat16
    if isinstance(rule, Kin):
        assert spec.k is not None
        nested = len(prefixes(spec.d_sae)) if rule.nested else 1
        scratch += batch * (spec.k + d_in // 2) * _ENTRY_BYTES + 3 * nested * batch * d_in * 4
        scratch += rows * spec.d_sae * 4 if device.type == "cpu" else 0  # NumPy's copy of what it searches
    else:
        dense = min(rows_at_once(spec.d_sae, batch, device, dense=True), batch)
        pairs = DENSE_ABOVE[device.type] * min(rows_at_once(spec.d_sae, batch, device, dense=False), batch) * spec.d_sae
        pairs *= ROOM if device.type == "cuda" else 1.0
        all_latents = (_DENSE_ARRAYS * dense - rows) * spec.d_sae * 4  # where the rows of a selection are not held
        scratch += max(all_latents, int(pairs) * _ENTRY_BYTES) + matrix
        scratch += 2 * batch * d_in * 4  # the rows that dead latents may be pointed at
    moments = 2 * weights - EDITIONS[spec.edition].muon * (matrix - RANK * d_in * 4)
    return Need(weights, moments, weights, scratch)


def check_memory(
    specs: Sequence[Spec], widths: Sequence[int], batch: int, device: str, buffers: int, processes: int = 1
) -> None:
    """Say what a grid takes, of vectors of these `widths` and beside `buffers` that a CPU has to hold as well, in one of so many `processes`.

    Raises ValueError where its device has less, with how many of its SAEs would fit.
    """
    needs = [need_of(spec, d_in, batch, torch.device(device)) for spec, d_in in zip(specs, widths, strict=True)]
    total = sum(need.held for need in needs) + max(need.passing for need in needs)
    free = free_memory(torch.device(device))
    if torch.device(device).type == "cpu":
        free = free // processes - buffers
    for spec, need in {(s.architecture, s.d_sae): (s, n) for s, n in zip(specs, needs, strict=True)}.values():
        log.info(
            "%s of %s latents: weights %s, moments %s; in its step gradients %s, scratch %s MB",
            spec.architecture, f"{spec.d_sae:,}", *(f"{part / 1e6:,.0f}" for part in need),
        )  # fmt: skip
    log.info(
        "%d SAEs take at most %.1f GB of %s, which has %.1f GB for them", len(specs), total / 1e9, device, free / 1e9
    )
    if total <= free:
        return
    fit = [
        n
        for n in range(1, len(specs))
        if sum(need.held for need in needs[:n]) + max(n.passing for n in needs[:n]) <= free
    ]
    widest = max(spec.d_sae for spec in specs)
    remedy = (
        f"the first {fit[-1]} would fit: train the grid in parts"
        if fit
        else f"one of {widest:,} latents alone is too large: use a smaller --d-sae than {widest:,}, or a smaller --batch than {batch:,}"
    )
    raise ValueError(
        f"{len(specs)} SAEs take about {total / 1e9:.1f} GB of {device} and it has {free / 1e9:.1f} GB for them; {remedy}"
    )


def free_memory(device: torch.device) -> int:
    """Bytes that a process may take of a GPU; of a CPU all that the machine has, since what is free there may be cache."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return total_memory()


def total_memory() -> int:
    """Bytes of memory that the machine has, or the container that this runs in."""
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        with contextlib.suppress(OSError, ValueError):  # there is none, or it is `max`
            most = min(most, int(limit.read_text()))
    return most
