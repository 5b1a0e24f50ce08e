"""Members trained step by step on made rows, or a store's, in one process or in several that share them, for tests to compare."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saebench.harvest.ranks import joined
from saebench.store import Partition, joint_batches, open_store
from saebench.train import Member, Spec
from saebench.train.shares import SHARES, Share, share_of
from saebench.train.teams import joined_ends, team_step, teams_of

D, F, B = 16, 64, 48
HOOKS = ("a", "b", "c")
ENDS: dict[str, dict[str, Any]] = {
    "sae": {"hook": "a"},
    "transcoder": {"reads": ("a",), "writes": ("b",), "skip": True},
    "crosscoder": {"reads": ("a", "b"), "writes": ("a", "b")},
}


class Case(NamedTuple):
    architecture: str
    kind: str = "sae"
    n_steps: int = 20
    dtype: torch.dtype = torch.float64
    edition: int = 2
    partitions: int = 0
    """that rows of a store are dealt out to; none of those that are made"""

    @property
    def specs(self) -> list[Spec]:
        sparsity: dict[str, Any] = (
            {"k": 4} if self.architecture in ("topk", "batchtopk", "matryoshka") else {"target_l0": 4.0}
        )
        common: dict[str, Any] = {
            "architecture": self.architecture,
            "d_sae": F,
            "lr": 3e-3,
            "edition": self.edition,
            "seed": 0,
            **sparsity,
        }
        if self.kind != "clt":
            return [Spec(name=self.kind, **ENDS[self.kind], **common)]
        later = {"a": ("b", "c"), "b": ("c",)}
        return [
            Spec(name=read, reads=(read,), writes=writes, set="clt", joint=True, **common)
            for read, writes in later.items()
        ]


ARCHITECTURES = ("relu", "topk", "gated", "batchtopk", "jumprelu", "matryoshka")
RESUMED = ("relu", "batchtopk")
ALL = int(os.environ.get("SAEBENCH_KILLS", "3")) > 3
LONG, SHORT = (200, 20) if ALL else (24, 12)  # steps
CASES = [
    *(Case(architecture, n_steps=LONG) for architecture in (ARCHITECTURES if ALL else ("relu", "batchtopk"))),
    *(Case(*of, n_steps=SHORT) for of in (("topk", "transcoder"), ("gated", "crosscoder"), ("matryoshka", "clt"), ("jumprelu", "clt"))),
    Case("batchtopk", n_steps=LONG, partitions=4),
    Case("relu", n_steps=SHORT, edition=3),
    *(Case(architecture, n_steps=SHORT, dtype=torch.float32) for architecture in (ARCHITECTURES if ALL else ("relu", "topk"))),
]  # fmt: skip


BOTH = [n for n, of in enumerate(CASES) if of.n_steps == SHORT or of.architecture in ("relu", "topk", "batchtopk")]
"""of them, those that are shared both ways at once"""


def batches(case: Case, share: Share, store: Path) -> Iterator[dict[str, Tensor]]:
    """Those of this process: of rows of few of 40 directions, which all make alike, or of the partitions of a store that it reads."""
    if not case.partitions:
        for rows in made(case):
            yield {hook: share.rows_of(x) for hook, x in rows.items()}
        return
    opened = open_store(store)
    streams = [
        joint_batches(opened, opened.hooks[:1], B // case.partitions, seed=2, partition=Partition(n, case.partitions))
        for n in share.partitions(case.partitions)
    ]
    for _ in range(case.n_steps):
        x = torch.cat([next(stream)[0][opened.hooks[0]][:, :D] for stream in streams]).double()
        yield {"a": x - x.mean(1, keepdim=True)}


def made(case: Case) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    directions = {hook: torch.randn(40, D, generator=generator) for hook in HOOKS}
    for _ in range(case.n_steps):
        active = (torch.rand(B, 40, generator=generator) < 0.08) * torch.rand(B, 40, generator=generator)
        rows = {hook: active @ directions[hook] + 0.3 for hook in HOOKS}
        yield {hook: x * (D / x.square().sum(1).mean()).sqrt() for hook, x in rows.items()}


def members_of(case: Case, share: Share) -> list[Member]:
    made = []
    for spec in case.specs:
        means = [joined_ends([torch.full((D,), 0.3) for _ in hooks]) for hooks in spec.ends]
        other = None if spec.ends.tied else means[1]
        parts = (D,) * len(spec.ends.writes)
        member = Member(spec, means[0], 8, case.n_steps, "cpu", mean_E=other, parts=parts, share=share)
        first = share.first_latent(member.sae.d_sae)
        for name in {"b_enc", "b_gate", "b_mag"} & {*member.parameters}:
            for dead in (3, 20, 21, 50):  # not as many for each of two processes
                if 0 <= dead - first < member.sae.d_sae:
                    member.parameters[name].data[dead - first] = -20.0
        made.append(member)
    return made


def course(case: Case, share: Share, store: Path, stop: int = 0) -> tuple[list[list[float]], list[dict[str, Tensor]]]:
    """(what the log says of each step, of all members; their whole weights in the end). With `stop`, state goes through that of a
    checkpoint and into new members after as many steps."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(case.dtype)
    try:
        members = members_of(case, share)
        lines = []
        for step, rows in enumerate(batches(case, share, store)):
            if stop and step == stop:
                saved = [{name: value.clone() for name, value in member.state().items()} for member in members]
                members = members_of(case, share)
                for member, state in zip(members, saved, strict=True):
                    member.restore(state)
            for team in teams_of(members):
                team_step(team, rows, step)
            lines.append([float(value) for member in members for value in member.log_line(step).values()])
        return lines, [{k: v.clone() for k, v in share.whole(member.sae).state_dict().items()} for member in members]
    finally:
        torch.set_default_dtype(before)


def run(rank: int, size: int, port: int, folder: Path, store: Path) -> None:
    """What each of four processes has of each case that its circle of two is dealt, shared in either way, and of those that all four
    share in both; once without and once with a restored state; `{case: {over: …}}`."""
    torch.set_num_threads(1)
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test",
        "WORLD_SIZE": str(size),
        "RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
    }
    os.environ |= {"MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    with joined("training") as world:
        circle = world.circle(2)
        shares = {over: kind(circle, B) for over, kind in SHARES.items()}
        found: dict[int, dict[str, Any]] = {number: {} for number in range(len(CASES))}
        for number in range(rank // 2, len(CASES), size // 2):
            found[number] = {over: twice(CASES[number], share, store) for over, share in shares.items()}
        both = share_of(world, B, 2, 2)
        for number in BOTH:
            found[number]["both"] = twice(CASES[number], both, store)
    torch.save(found, folder / f"{rank}.pt")


def twice(case: Case, share: Share, store: Path) -> tuple[Any, Any]:
    """Its course, and that of some cases with a restored state."""
    resumed = case.architecture in RESUMED and case.n_steps == LONG and not case.partitions
    return course(case, share, store), course(case, share, store, 13) if resumed else None
