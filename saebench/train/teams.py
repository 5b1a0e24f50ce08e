"""The SAEs of a run as they are trained: made on its rows, and taking their steps with those that write where they do."""

import torch
from torch import Tensor

from saebench.train.gradients import together
from saebench.train.identity import Run
from saebench.train.member import Member
from saebench.train.shares import Share
from saebench.train.spec import Spec

Inputs = dict[str, tuple[float, Tensor]]
"""For each hook, what its vectors are multiplied by, and the mean of what that makes of them."""


def member_of(run: Run, spec: Spec, inputs: Inputs, device: str, share: Share) -> Member:
    """An SAE of a run, untrained, or this process's share of it."""
    config, (reads, writes) = run.config, spec.ends
    means = [[inputs[hook][1] for hook in hooks] for hooks in (reads, writes)]
    if spec.joint:  # each hook has one bias, that of its own layer's member
        means[1][1:] = [torch.zeros_like(mean) for mean in means[1][1:]]
    return Member(
        spec, joined_ends(means[0]), config.dead_steps(spec), config.n_steps, device, config.dtype == "bfloat16",
        mean_E=None if spec.ends.tied else joined_ends(means[1]), parts=run.widths(writes), share=share,
    )  # fmt: skip


def scale_of(run: Run, inputs: Inputs, hooks: tuple[str, ...]) -> float | Tensor:
    """What vectors of these hooks are multiplied by: a number, or one for each of their coordinates."""
    if len(hooks) == 1:
        return inputs[hooks[0]][0]
    return torch.tensor([inputs[hook][0] for hook in hooks]).repeat_interleave(torch.tensor(run.widths(hooks)))


def teams_of(members: list[Member]) -> list[list[Member]]:
    """Those that take their steps together, side by side."""
    teams: dict[str, list[Member]] = {}
    for member in members:
        teams.setdefault(member.spec.team, []).append(member)
    for team in teams.values():
        for member in team:
            member.company = team
    return list(teams.values())


def team_step(team: list[Member], rows: dict[str, Tensor], step: int) -> None:
    """A step of all of them on the rows of each hook, scaled."""
    member, ends = team[0], team[0].spec.ends
    if not member.spec.joint:
        y_BE = None if ends.tied else joined_ends([rows[hook] for hook in ends.writes])
        member.step(joined_ends([rows[hook] for hook in ends.reads]), step, y_BE)
        return
    variances = {hook: member.share.variance_of(rows[hook]) for hook in ends.writes}
    steps = []
    for member in team:
        (read,), (own, *others) = member.spec.ends
        y_BE = joined_ends([rows[own], *(torch.zeros_like(rows[hook]) for hook in others)])
        variance = torch.stack([variances[hook] for hook in (own, *others)]).sum()
        steps.append(member.steps(rows[read], step, y_BE, variance))
    together(steps, [member.spec.ends.writes for member in team], {hook: rows[hook].shape[1] for hook in variances})
    # With one of them all of what is written is lost.
    diverged = torch.stack([member.diverged_at for member in team]).max()
    for member in team:
        member.diverged_at = torch.where(member.diverged_at < 0, diverged, member.diverged_at)


def joined_ends(vectors: list[Tensor]) -> Tensor:
    """Those of several hooks one behind the other; those of one as they are."""
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=-1)
