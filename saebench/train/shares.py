"""What a training step asks of the other processes that share an SAE: sums, and which latents are active.

A share is of rows, of latents, or of both: some latents of some rows. Each method says of which of the others it asks; where nothing is
shared, of none. Legend: B rows of the batch, R rows of this process, F latents of this process, D and E widths read and written,
N processes, n entries.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from saebench.harvest.ranks import World
from saebench.sae import SAE, TopKSAE, new_sae, reconstruct_sparse
from saebench.sae.architectures import NOT_OF_LATENTS
from saebench.sae.sparse import Encoder, SparseCode, select

Found = tuple[SparseCode, Float[Tensor, " n"]]
_SCALARS = ("sparsity", "auxiliary", "total", "fired")
_OF_ROWS = ("along_F", "fires_F", "reconstruction")  # what all that share latents have for their own, or alike


class Share:
    """What a process has of an SAE.

    Of those who share rows, weights and what is learned beside them are the same in all; of those who share latents each has its own, with
    their moments, and b_dec and W_skip are the same in all.
    """

    def __init__(
        self, world: World = World(), batch: int = 0, *, rows: World | None = None, latents: World | None = None
    ) -> None:
        """Among the processes of a circle, of batches of so many rows. `rows` are those of it that have other rows of the same latents, and
        `latents` those that have other latents for the same rows: either the circle, or both parts of it."""
        self.world, self.batch, self.rows, self.latents = world, batch, rows, latents
        self._row, self._n_row = (rows.rank, rows.size) if rows else (0, 1)
        self._part, self._n_parts = (latents.rank, latents.size) if latents else (0, 1)

    @property
    def over(self) -> str:
        """What is shared."""
        return "latents" if self.latents else "rows" if self.rows else "grid"

    # ------------------------------------------------------------------- which part is this process's

    def partitions(self, n: int) -> range:
        """Of so many that the rows of a store are dealt out to, those that this process reads."""
        if n == 1:  # as runs were begun before there were several: all read all
            return range(1)
        each = n // self._n_row
        return range(each * self._row, each * (self._row + 1))

    def rows_of(self, x_BD: Tensor) -> Tensor:
        """Those of a batch that this process takes."""
        return x_BD.chunk(self._n_row)[self._row]

    def n_rows(self, here: int) -> int:
        """Rows of the batch of which so many are here."""
        return here * self._n_row

    def n_latents(self, here: int) -> int:
        return here * self._n_parts

    def first_latent(self, here: int) -> int:
        """How many the processes before this one hold, each as many as are here."""
        return here * self._part

    def part(self, sae: SAE) -> SAE:
        """What this process holds of one."""
        if self.latents is None:
            return sae
        n, rest = divmod(sae.d_sae, self._n_parts)
        assert not rest
        mine, span = self._like(sae, n), slice(n * self._part, n * (self._part + 1))
        for name, value in sae.state_dict().items():
            mine.state_dict()[name].copy_(_latents(name, value, span))
        if not sae.tied:
            mine.mean_D.copy_(sae.mean_D)
        return mine

    def whole(self, sae: SAE) -> SAE:
        """The one of which this process holds a part, on the host: no device need hold it."""
        if self.latents is None:
            return sae
        found = self._like(sae, self.n_latents(sae.d_sae))
        for name, value in sae.state_dict().items():
            if name in NOT_OF_LATENTS:
                found.state_dict()[name].copy_(value)
                continue
            parts = self._gather((value.T if name == "W_enc" else value).cpu(), self.latents).flatten(0, 1)
            found.state_dict()[name].copy_(parts.T if name == "W_enc" else parts)
        if not sae.tied:
            found.mean_D.copy_(sae.mean_D)
        return found

    def _like(self, sae: SAE, d_sae: int) -> SAE:
        k = sae.k if isinstance(sae, TopKSAE) else None
        made = new_sae(sae.architecture, sae.d_in, d_sae, k=None if k is None else min(k, d_sae), writes=sae.writes)
        if isinstance(made, TopKSAE) and k is not None:
            made.k = k  # of all latents
        for name, value in made.named_parameters():
            value.requires_grad_(dict(sae.named_parameters())[name].requires_grad)
        return made

    # ------------------------------------------------------------------------ which latents are active

    def topk(self, encoder: Encoder, k: int) -> Found:
        """The k largest pre-activations of each row."""
        if self.latents is None:
            return encoder.topk(k)
        n_rows, own = len(encoder.z_RD), min(k, len(encoder.bias_F))
        if own:
            code, values = encoder.topk(own)
        else:
            offsets = torch.zeros(n_rows + 1, dtype=torch.int32, device=encoder.z_RD.device)
            code, values = SparseCode(offsets, offsets[:0], 0), encoder.bias_F[:0]
        padded_RK = values.new_full((n_rows, k), -torch.inf)
        padded_RK[:, :own] = values.view(n_rows, own)
        everyones = self._gather(padded_RK, self.latents).transpose(0, 1).flatten(1)
        best = everyones.topk(k, dim=1, sorted=False).indices
        chosen = torch.zeros_like(everyones, dtype=torch.bool).scatter_(1, best, True)
        start = k * self._part
        return select(code, values, chosen[:, start : start + own].flatten())

    def batch_topk(self, encoder: Encoder, k: int, guess: float) -> Found:
        """The k·B largest positive pre-activations of the batch. Those above `guess` are tried first."""
        if self.over == "grid":
            return encoder.batch_topk(k, guess)
        wanted = k * self.n_rows(len(encoder.z_RD))
        found, sizes = None, torch.zeros(1, dtype=torch.int64)
        if guess > 0:
            found = encoder.above(guess)
            sizes = self._gather(torch.tensor(len(found[1])), self.world)
        if found is None or int(sizes.sum()) < wanted:
            found = encoder.batch_topk(k * self._n_row)  # all may be here
            sizes = self._gather(torch.tensor(len(found[1])), self.world)
        code, values = found
        if (total := int(sizes.sum())) <= wanted:
            return code, values
        padded = values.new_full((int(sizes.max()),), -torch.inf)
        padded[: len(values)] = values
        everyones = self._gather(padded, self.world)
        best = everyones.flatten().topk(min(wanted, total), sorted=False).indices
        chosen = torch.zeros_like(everyones, dtype=torch.bool).flatten().index_fill_(0, best, True)
        return select(code, values, chosen.view_as(everyones)[self.world.rank, : len(values)])

    # --------------------------------------------------------------------------------- sums over latents

    def once(self, value: Tensor) -> Tensor:
        """What all that share latents have alike, as that process gives it which counts in a sum over them."""
        return torch.zeros_like(value) if self._part else value

    def written(self, part: Tensor) -> Tensor:
        """What all latents write, of what these do."""
        return self._sum(part, self.latents)

    def reconstructed(self, sae: SAE, x_RD: Float[Tensor, "R D"]) -> Float[Tensor, "R E"]:
        """What all latents of an SAE write, and its biases."""
        if self.latents is None:
            return reconstruct_sparse(sae, x_RD)[0]
        base = sae.base(x_RD)
        return self.written(reconstruct_sparse(sae, x_RD)[0] - base) + base

    def count(self, here: int) -> int:
        """Latents, of so many among those of this process."""
        return here if self.latents is None else int(self._gather(torch.tensor(here), self.latents).sum())

    def before(self, here: int) -> int:
        """Of such latents those that processes before this one hold."""
        return 0 if self.latents is None else int(self._gather(torch.tensor(here), self.latents)[: self._part].sum())

    def mean(self, values: Tensor) -> Tensor:
        """Of what each latent has."""
        if self.latents is None:
            return values.mean()
        here = torch.stack([values.sum(), values.new_tensor(values.numel())])
        total, count = self._sum(here, self.latents).unbind(0)
        return total / count

    def norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """That of all of them together, by the names of their parameters."""
        if self.latents is None:
            return torch.nn.utils.get_total_norm(list(gradients.values()))
        own = [value for name, value in gradients.items() if self.latents.leads or name not in NOT_OF_LATENTS]
        return self._sum(torch.nn.utils.get_total_norm(own).square(), self.latents).sqrt()

    def over_latents(self, value: Tensor) -> Tensor:
        """Of sums over the latents of each process, those over all."""
        return self._sum(value, self.latents)

    # ---------------------------------------------------------------------------- sums over rows, and all

    def variance_of(self, y_RE: Float[Tensor, "R E"]) -> Float[Tensor, ""]:
        """Σ_e var_e of the batch."""
        if self.rows is None:
            return (y_RE - y_RE.mean(0)).norm().square() / len(y_RE)
        n_rows = self.n_rows(len(y_RE))
        mean_E = self._sum(y_RE.sum(0), self.rows) / n_rows
        return self._sum((y_RE - mean_E).norm().square(), self.rows) / n_rows

    def settle(self, gradients: Any) -> None:
        """Make sums of what all processes have found: over rows of what is for each latent, over all of the rest."""
        if self.over == "grid":
            return
        dtype, of = gradients.variance.dtype, gradients.of
        scalars = _those(gradients, _SCALARS)
        alike = {name: value for name, value in of.items() if name in NOT_OF_LATENTS}
        if self.rows is None:
            found = self._sums(alike | scalars, self.latents, dtype)
        else:
            gradients.reconstruction = gradients.error_B.sum() / gradients.n_rows
            of_rows = _those(gradients, _OF_ROWS)
            if self.latents is None:  # all in one message
                found = self._sums(of | of_rows | scalars, self.rows, dtype)
            else:
                own = {name: value for name, value in of.items() if name not in alike}
                found = self._sums(own | of_rows, self.rows, dtype) | self._sums(alike | scalars, self.world, dtype)
        for name, value in found.items():
            if name in of:
                of[name] = value
            else:
                setattr(gradients, name, value)
        if gradients.least_active is not None:
            gradients.least_active = self._gather(gradients.least_active, self.world).min()

    def either(self, *flags: Tensor) -> tuple[Tensor, ...]:
        """Those that are true in some process."""
        if self.world.size == 1:
            return flags
        return tuple(self._gather(torch.stack(flags).int(), self.world).amax(0).bool().unbind(0))

    def pooled(self, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the largest keys of all processes, as many as the batch has, from the largest on."""
        if self.rows is None or not len(keys):
            return rows, keys
        # As many as the batch has rows are in each process's, once it has seen so many.
        everyones, all_rows = self._gather(keys, self.rows).flatten(), self._gather(rows, self.rows).flatten(0, 1)
        keys, best = everyones.topk(min(self.batch, len(everyones)))
        return all_rows[best], keys

    def own_pool(self, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """What this process keeps of such rows."""
        mine = slice(self._row, None, self._n_row)
        return rows[mine], keys[mine]

    # ------------------------------------------------------------------------------------ collectives

    def _sum(self, value: Tensor, world: World | None) -> Tensor:
        """In place where it is contiguous; of nobody else, as it is."""
        if world is None:
            return value
        value = value.contiguous()
        with world.meeting():
            dist.all_reduce(value, group=world.group)
        return value

    def _sums(self, values: Mapping[str, Tensor], world: World | None, dtype: torch.dtype) -> dict[str, Tensor]:
        """In one message."""
        flat = self._sum(torch.cat([value.reshape(-1).to(dtype) for value in values.values()]), world)
        parts = zip(values.items(), flat.split([value.numel() for value in values.values()]), strict=True)
        return {name: part.view(value.shape).to(value.dtype) for (name, value), part in parts}

    def _gather(self, value: Tensor, world: World) -> Tensor:
        """`[N, …]`, of tensors of one shape."""
        found = value.new_empty(world.size, *value.shape)
        with world.meeting():
            dist.all_gather(list(found.unbind(0)), value.contiguous(), group=world.group)
        return found


SHARES: dict[str, Callable[[World, int], Share]] = {
    "rows": lambda circle, batch: Share(circle, batch, rows=circle),
    "latents": lambda circle, batch: Share(circle, batch, latents=circle),
}
"""the ways to share an SAE among all of a circle, by their names in settings"""


def share_of(world: World, batch: int, n_rows: int, n_latents: int) -> Share:
    """Of circles in which so many hold the same latents, and take as many parts of the rows, and so many have the same rows. All have to ask
    for theirs."""
    circle = world.circle(n_rows * n_latents)
    rows = circle if n_latents == 1 else world.circle(n_rows, stride=n_latents)
    latents = circle if n_rows == 1 else world.circle(n_latents)
    return Share(circle, batch, rows=rows if n_rows > 1 else None, latents=latents if n_latents > 1 else None)


def _latents(name: str, value: Tensor, which: slice) -> Tensor:
    """Of a parameter of an SAE, what it has for these latents; of one that has nothing for each, all."""
    return value if name in NOT_OF_LATENTS else value[:, which] if name == "W_enc" else value[which]


def _those(gradients: Any, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Of these, what a rule has found."""
    return {name: value for name in names if (value := getattr(gradients, name)) is not None}
