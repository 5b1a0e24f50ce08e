"""What a training step asks of the other processes that share an SAE: sums, and which latents are active.

`Share` is that of a process which has an SAE to itself, where nothing is asked; its subclasses are two ways to share one. Legend: B rows of
the batch, R rows of this process, F latents of this process, D and E widths read and written, N processes, n entries.
"""

from collections.abc import Mapping
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


class Share:
    """The whole of an SAE and of each batch."""

    over = "grid"
    """what is shared"""

    def __init__(self, world: World = World(), batch: int = 0) -> None:
        """Among the processes of a world, or of one of its circles, of batches of so many rows."""
        self.world, self.batch = world, batch

    # ------------------------------------------------------------------- which part is this process's

    def partitions(self, n: int) -> range:
        """Of so many that the rows of a store are dealt out to, those that this process reads."""
        return range(n)

    def rows_of(self, x_BD: Tensor) -> Tensor:
        """Those of a batch that this process takes."""
        return x_BD

    def n_rows(self, here: int) -> int:
        """Rows of the batch of which so many are here."""
        return here

    def part(self, sae: SAE) -> SAE:
        """What this process holds of one."""
        return sae

    def whole(self, sae: SAE) -> SAE:
        """The one of which this process holds a part."""
        return sae

    def n_latents(self, here: int) -> int:
        return here

    def first_latent(self, here: int) -> int:
        """How many the processes before this one hold, each as many as are here."""
        return 0

    # --------------------------------------------------------------------------------------- a step

    def topk(self, encoder: Encoder, k: int) -> Found:
        """The k largest pre-activations of each row."""
        return encoder.topk(k)

    def batch_topk(self, encoder: Encoder, k: int, guess: float) -> Found:
        """The k·B largest positive pre-activations of the batch."""
        return encoder.batch_topk(k, guess)

    def once(self, value: Tensor) -> Tensor:
        """What all processes have alike, as that process gives it which counts in a sum over all."""
        return value

    def written(self, part: Tensor) -> Tensor:
        """What all latents write, of what these do."""
        return part

    def reconstructed(self, sae: SAE, x_RD: Float[Tensor, "R D"]) -> Float[Tensor, "R E"]:
        """What all latents of an SAE write, and its biases."""
        return reconstruct_sparse(sae, x_RD)[0]

    def count(self, here: int) -> int:
        """Latents, of so many among those of this process."""
        return here

    def before(self, here: int) -> int:
        """Of such latents those that processes before this one hold."""
        return 0

    def mean(self, values: Tensor) -> Tensor:
        """Of what each latent has."""
        return values.mean()

    def variance_of(self, y_RE: Float[Tensor, "R E"]) -> Float[Tensor, ""]:
        """Σ_e var_e of the batch."""
        return (y_RE - y_RE.mean(0)).norm().square() / len(y_RE)

    def settle(self, gradients: Any) -> None:
        """Make sums of what all processes have found."""

    def norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """That of all of them together, by the names of their parameters."""
        return torch.nn.utils.get_total_norm(list(gradients.values()))

    def either(self, *flags: Tensor) -> tuple[Tensor, ...]:
        """Those that are true in some process."""
        if self.world.size == 1:
            return flags
        return tuple(self._gather(torch.stack(flags).int()).amax(0).bool().unbind(0))

    def pooled(self, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the largest keys of all processes, as many as the batch has, from the largest on."""
        return rows, keys

    def own_pool(self, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """What this process keeps of such rows."""
        return rows, keys

    # ------------------------------------------------------------------------------------ collectives

    def _sum(self, value: Tensor) -> Tensor:
        """In place where it is contiguous."""
        value = value.contiguous()
        with self.world.meeting():
            dist.all_reduce(value, group=self.world.group)
        return value

    def _gather(self, value: Tensor) -> Tensor:
        """`[N, …]`, of tensors of one shape."""
        found = value.new_empty(self.world.size, *value.shape)
        with self.world.meeting():
            dist.all_gather(list(found.unbind(0)), value.contiguous(), group=self.world.group)
        return found

    def _add_up(self, gradients: Any, summed: list[Tensor]) -> list[Tensor]:
        """Sums of these and of a step's scalars in one message; the least activation by another. Returns those of the first."""
        dtype = gradients.variance.dtype
        names = [n for n in ("sparsity", "auxiliary", "total", "fired") if getattr(gradients, n) is not None]
        parts = [*summed, *(getattr(gradients, name) for name in names)]
        flat = self._sum(torch.cat([part.reshape(-1).to(dtype) for part in parts]))
        found = [
            f.view(p.shape).to(p.dtype) for f, p in zip(flat.split([p.numel() for p in parts]), parts, strict=True)
        ]
        for name, value in zip(names, found[len(summed) :], strict=True):
            setattr(gradients, name, value)
        if gradients.least_active is not None:
            gradients.least_active = self._gather(gradients.least_active).min()
        return found[: len(summed)]

    def _largest(self, encoder: Encoder, wanted: int, k: int, guess: float) -> Found:
        """This process's part of the `wanted` largest positive pre-activations of all, of whose own as many are k to a row.

        Those above `guess` are tried first.
        """
        found, sizes = None, torch.zeros(1, dtype=torch.int64)
        if guess > 0:
            found = encoder.above(guess)
            sizes = self._gather(torch.tensor(len(found[1])))
        if found is None or int(sizes.sum()) < wanted:
            found = encoder.batch_topk(k)
            sizes = self._gather(torch.tensor(len(found[1])))
        code, values = found
        if (total := int(sizes.sum())) <= wanted:
            return code, values
        padded = values.new_full((int(sizes.max()),), -torch.inf)
        padded[: len(values)] = values
        everyones = self._gather(padded)
        best = everyones.flatten().topk(min(wanted, total), sorted=False).indices
        chosen = torch.zeros_like(everyones, dtype=torch.bool).flatten().index_fill_(0, best, True)
        return select(code, values, chosen.view_as(everyones)[self.world.rank, : len(values)])


class RowShare(Share):
    """A part of each batch's rows; weights, and what is learned beside them, are the same in all processes."""

    over = "rows"

    def partitions(self, n: int) -> range:
        if n == 1:  # as runs were begun before there were several: all read all
            return range(1)
        each = n // self.world.size
        return range(each * self.world.rank, each * (self.world.rank + 1))

    def rows_of(self, x_BD: Tensor) -> Tensor:
        return x_BD.chunk(self.world.size)[self.world.rank]

    def n_rows(self, here: int) -> int:
        return here * self.world.size

    def batch_topk(self, encoder: Encoder, k: int, guess: float) -> Found:
        wanted = k * self.n_rows(len(encoder.z_RD))
        return self._largest(encoder, wanted, k * self.world.size, guess)

    def variance_of(self, y_RE: Tensor) -> Tensor:
        n_rows = self.n_rows(len(y_RE))
        mean_E = self._sum(y_RE.sum(0)) / n_rows
        return self._sum((y_RE - mean_E).norm().square()) / n_rows

    def settle(self, gradients: Any) -> None:
        gradients.reconstruction = gradients.error_B.sum() / gradients.n_rows
        assert gradients.fires_F is not None
        more = [
            value for value in (gradients.along_F, gradients.fires_F, gradients.reconstruction) if value is not None
        ]
        summed = self._add_up(gradients, [*gradients.of.values(), *more])
        gradients.of = dict(zip(gradients.of, summed, strict=False))
        *along, gradients.fires_F, gradients.reconstruction = summed[len(gradients.of) :]
        gradients.along_F = along[0] if along else None

    def pooled(self, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        if not len(keys):
            return rows, keys
        # As many as the batch has rows are in each process's, once it has seen so many.
        everyones, all_rows = self._gather(keys).flatten(), self._gather(rows).flatten(0, 1)
        keys, best = everyones.topk(min(self.batch, len(everyones)))
        return all_rows[best], keys

    def own_pool(self, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        mine = slice(self.world.rank, None, self.world.size)
        return rows[mine], keys[mine]


class LatentShare(Share):
    """A part of the latents, with their moments; each process sees all rows, and b_dec and W_skip are the same in all."""

    over = "latents"

    def part(self, sae: SAE) -> SAE:
        n, rest = divmod(sae.d_sae, self.world.size)
        assert not rest
        mine = self._like(sae, n)
        for name, value in sae.state_dict().items():
            mine.state_dict()[name].copy_(_latents(name, value, slice(n * self.world.rank, n * (self.world.rank + 1))))
        if not sae.tied:
            mine.mean_D.copy_(sae.mean_D)
        return mine

    def whole(self, sae: SAE) -> SAE:
        """On the host: no device need hold it."""
        found = self._like(sae, self.n_latents(sae.d_sae))
        for name, value in sae.state_dict().items():
            if name in NOT_OF_LATENTS:
                found.state_dict()[name].copy_(value)
                continue
            parts = self._gather((value.T if name == "W_enc" else value).cpu()).flatten(0, 1)
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

    def n_latents(self, here: int) -> int:
        return here * self.world.size

    def first_latent(self, here: int) -> int:
        return here * self.world.rank

    def topk(self, encoder: Encoder, k: int) -> Found:
        n_rows, own = len(encoder.z_RD), min(k, len(encoder.bias_F))
        if own:
            code, values = encoder.topk(own)
        else:
            offsets = torch.zeros(n_rows + 1, dtype=torch.int32, device=encoder.z_RD.device)
            code, values = SparseCode(offsets, offsets[:0], 0), encoder.bias_F[:0]
        padded_RK = values.new_full((n_rows, k), -torch.inf)
        padded_RK[:, :own] = values.view(n_rows, own)
        everyones = self._gather(padded_RK).transpose(0, 1).flatten(1)
        best = everyones.topk(k, dim=1, sorted=False).indices
        chosen = torch.zeros_like(everyones, dtype=torch.bool).scatter_(1, best, True)
        start = k * self.world.rank
        return select(code, values, chosen[:, start : start + own].flatten())

    def batch_topk(self, encoder: Encoder, k: int, guess: float) -> Found:
        return self._largest(encoder, k * len(encoder.z_RD), k, guess)

    def once(self, value: Tensor) -> Tensor:
        return value if self.world.leads else torch.zeros_like(value)

    def written(self, part: Tensor) -> Tensor:
        return self._sum(part)

    def reconstructed(self, sae: SAE, x_RD: Tensor) -> Tensor:
        base = sae.base(x_RD)
        return self.written(reconstruct_sparse(sae, x_RD)[0] - base) + base

    def count(self, here: int) -> int:
        return int(self._gather(torch.tensor(here)).sum())

    def before(self, here: int) -> int:
        return int(self._gather(torch.tensor(here))[: self.world.rank].sum())

    def mean(self, values: Tensor) -> Tensor:
        total, count = self._sum(torch.stack([values.sum(), values.new_tensor(values.numel())])).unbind(0)
        return total / count

    def settle(self, gradients: Any) -> None:
        alike = [name for name in gradients.of if name in NOT_OF_LATENTS]
        summed = self._add_up(gradients, [gradients.of[name] for name in alike])
        gradients.of |= dict(zip(alike, summed, strict=True))

    def norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        own = [value for name, value in gradients.items() if self.world.leads or name not in NOT_OF_LATENTS]
        squared = torch.nn.utils.get_total_norm(own).square()
        return self._sum(squared).sqrt()


SHARES: dict[str, type[Share]] = {kind.over: kind for kind in (RowShare, LatentShare)}
"""the ways to share an SAE, by their names in settings"""


def _latents(name: str, value: Tensor, which: slice) -> Tensor:
    """Of a parameter of an SAE, what it has for these latents; of one that has nothing for each, all."""
    return value if name in NOT_OF_LATENTS else value[:, which] if name == "W_enc" else value[which]
