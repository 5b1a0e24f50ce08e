"""Bytes that a process sends in a training step that it shares with others, and those it reads, beside the arithmetic of docs/scaling.md.

torchrun --nproc-per-node 2 benchmarks/ranks.py    # with 4 also of two replicas
torchrun --nproc-per-node 2 benchmarks/ranks.py --store STORE    # of its first hook, what sharing rows takes to read
"""

import argparse
import contextlib
import os
import socket
import stat
import struct
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from saebench.harvest.ranks import World, joined
from saebench.store import Partition, Store, joint_batches, open_store
from saebench.store.coding import row_bytes
from saebench.train import Member, Spec
from saebench.train.objectives import prefixes
from saebench.train.recipes import RECIPES
from saebench.train.shares import SHARES, Share, share_of

_ACKED = struct.Struct("@Q"), 120  # tcpi_bytes_acked of Linux' struct tcp_info


def sent() -> int:
    """Bytes that others have received over the open TCP connections of this process."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile, or not connected
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as found:
                    if found.type == socket.SOCK_STREAM and found.family in (socket.AF_INET, socket.AF_INET6):
                        info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
                        total += _ACKED[0].unpack_from(info, _ACKED[1])[0]
    return total


def expected(architecture: str, share: Share, d: int, f: int, b: int, k: int) -> float:
    """Of an all-reduce of s bytes among n, 2 s (n - 1) / n; of a gather of s, s (n - 1)."""
    kin, n_rows, n_latents = RECIPES[architecture].takes_k, share.n_rows(1), share.n_latents(1)
    n, of_rows, of_latents = n_rows * n_latents, 8 * (n_rows - 1) / n_rows, 8 * (n_latents - 1) / n_latents
    chosen = 4 * k * b / n_rows * (n_latents - 1) if architecture == "topk" else 4 * k * b / n * (n - 1)
    passes = {"gated": 2, "matryoshka": len(prefixes(f))}.get(architecture, 1)
    own = (2 * f * d + 2 * f + f * kin) / n_latents
    biases = 8 * (n - 1) / n * 2 * d
    return of_rows * own + biases * (n_rows > 1) + of_latents * passes * b / n_rows * d + chosen * kin


def measured(world: World, share: Share, architecture: str, told: argparse.Namespace) -> float:
    """Mean over some steps after the first."""
    level: dict[str, Any] = {"k": told.k} if RECIPES[architecture].takes_k else {"l1": 1.0}
    spec = Spec(name=architecture, hook="x", architecture=architecture, d_sae=told.f, lr=1e-3, seed=0, **level)
    member = Member(spec, torch.zeros(told.d), 10**6, 1000, "cpu", share=share)
    generator, before = torch.Generator().manual_seed(1), 0
    for step in range(1 + told.steps):
        if step == 1:
            world.gather(None)
            before = sent()
        member.step(share.rows_of(torch.randn(told.b, told.d, generator=generator)), step)
    world.gather(None)
    return (sent() - before) / told.steps


def read() -> int:
    """Bytes that this process has read, from disk or page cache."""
    return int(Path("/proc/self/io").read_text().split()[1])


def measured_reading(store: Store, world: World, batch: int, partitions: int) -> float:
    """Bytes a batch, over about an epoch, in buffers of which the one that is read ahead is little of it."""
    own, rows = SHARES["rows"](world, batch).partitions(partitions), store.rows("train")
    before, n_batches = read(), store.rows("train", kept=True) // batch
    streams = [
        joint_batches(
            store, store.hooks[:1], batch // partitions, seed=0, buffer_rows=rows // 50, partition=Partition(n, partitions)
        )
        for n in own
    ]  # fmt: skip
    for _ in islice(zip(*streams, strict=True), n_batches):
        pass
    return (read() - before) / n_batches


def report_reading(store: Store, world: World, batch: int) -> None:
    """With rows dealt out to a partition for each process, and to one that all read."""
    row = row_bytes(store.manifest["dtype"], store.d_in(store.hooks[0])) + 1  # whether it is kept
    a_batch = row * batch * store.rows("train") / store.rows("train", kept=True)
    for partitions in (1, world.size):
        expected = a_batch / partitions
        for rank, found in enumerate(world.gather(measured_reading(store, world, batch, partitions))):
            if world.leads:
                print(
                    f"partitions {partitions}, process {rank}: {found / 1e6:8.3f} MB read a batch, {expected / 1e6:8.3f} by arithmetic "
                    f"({found / expected:.3f})"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("d", 256), ("f", 2048), ("b", 1024), ("k", 32), ("steps", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--store", type=Path)
    told = parser.parse_args()
    with joined("training") as world:
        if told.store is not None:
            report_reading(open_store(told.store), world, told.b)
            return
        shares = {over: kind(world, told.b) for over, kind in SHARES.items()}
        if world.size % 2 == 0 and world.size > 2:
            shares["both"] = share_of(world, told.b, 2, world.size // 2)
        for over, share in shares.items():
            for architecture in RECIPES:
                found = measured(world, share, architecture, told)
                by_hand = expected(architecture, share, told.d, told.f, told.b, told.k)
                if world.leads:
                    print(
                        f"{over:8} {architecture:11} {found / 1e6:8.3f} MB a step, {by_hand / 1e6:8.3f} by arithmetic ({found / by_hand:.3f})"
                    )


if __name__ == "__main__":
    main()
