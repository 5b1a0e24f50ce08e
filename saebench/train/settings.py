"""What a training is told: a grid of SAEs, and how the rows come."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from saebench.config import Count, Multiple
from saebench.sae import Ends
from saebench.store.pair import TUNED
from saebench.store.shuffle import BUFFER_ROWS
from saebench.train.controls import Control
from saebench.train.memory import total_memory
from saebench.train.ranks import Over
from saebench.train.recipes import EDITIONS, RECIPES, RESAMPLED, Architecture
from saebench.train.schedules import WARMUP, default_learning_rate, pace
from saebench.train.spec import Spec

Precision = Literal["float32", "tf32", "bfloat16"]
Kind = Literal["sae", "transcoder", "crosscoder", "clt"]
Place = str | Ends
"""The hook of an SAE, or what others read and write."""
_MLP = "blocks.{}.mlp.hook_in", "blocks.{}.hook_mlp_out"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A grid: every architecture at every sparsity that applies to it, in every width, learning rate and seed."""

    store: Path
    """activation store to train on"""
    beside: Path | None = None
    """a second model's store of the same tokens, for a crosscoder of both: its hooks are named `tuned:HOOK`"""
    hook: tuple[str, ...] = ()
    """hooks in the store, a set of SAEs for each (default: the only one), or all of them of one crosscoder"""
    kind: Kind = "sae"
    """transcoder: reads the input of an MLP and writes its output; crosscoder: reads and writes several hooks at once; clt: a cross-layer transcoder, a set that reads the inputs of several layers' MLPs, each of which writes the outputs of its layer and of those after it"""
    layers: tuple[int, ...] = ()
    """layers whose MLPs get transcoders, or those of a clt (default: all of which the store has input and output)"""
    reads: tuple[str, ...] = ()
    """hooks that are read, with --writes, instead of --kind and --hook"""
    writes: tuple[str, ...] = ()
    """hooks that are written"""
    skip: bool = False
    """a transcoder also writes a linear map of what it reads"""
    out: Path
    """run directory; SAEs go to OUT/saes/NAME"""
    arch: tuple[Architecture, ...] = ()
    """architectures, for instance topk,relu (default: topk, or batchtopk where several hooks are written)"""
    k: tuple[int, ...] = ()
    """active latents per row, for topk, batchtopk and matryoshka"""
    target_l0: tuple[float, ...] = ()
    """mean L0 that λ is moved to meet, for relu, gated and jumprelu (for the others, the same as k)"""
    l1: tuple[float, ...] = ()
    """fixed λ instead of a target, for relu, gated and jumprelu"""
    d_sae: tuple[Count, ...] = ()
    """latents, one width or several (default: expansion × d_in)"""
    expansion: Count = 8
    """latents per input dimension, where d_sae is not given"""
    tokens: Count = 10_000_000
    """rows to train on; more than the store has means several epochs"""
    batch: Count = 4096
    """rows in a step"""
    lr: tuple[float, ...] = ()
    """peak learning rate, one or several (default: 6e-3 √(256/d_in), times (8 d_in/d_sae)^¼ where that is less; of jumprelu 3e-3 √(256/d_in); less after 4,000 steps, as 1/√steps)"""
    warmup: float = WARMUP
    """share of the steps in which the learning rate rises"""
    decay: float | None = None
    """share of the steps, at the end, in which it falls to 0 (default: 0.8, 0.2 for jumprelu, or as the run was begun)"""
    control: tuple[Control, ...] = ()
    """instead of SAEs, controls that must be beaten, trained alike but for a constraint: decoder rows stay at random (frozen-decoder), or within a cosine of 0.8 of it (soft-frozen), or the encoder's weights do (frozen-encoder; arXiv 2602.14111)"""
    dead_tokens: Count | None = None
    """rows without firing after which a latent counts as dead (default: a sixtieth of the run for topk, batchtopk and matryoshka, a twentieth for the others, at most 10M; or as the run was begun)"""
    memory_gb: float | None = None
    """memory for the two buffers that rows are shuffled in, for all hooks together (default: 2, or what 500,000 rows take)"""
    buffer_rows: Count | None = None
    """rows of such a buffer, instead of --memory-gb"""
    rolling: Count | None = None
    """keep at most so many training shards on disk: the store stays, and windows of the text behind it are harvested while training, and deleted; for a new store, the options of `harvest` follow at the end, after ` -- `"""
    exclude_outliers: Multiple | None = None
    """leave out rows longer than this many times the median norm, `none` for all rows (default: 10, massive rows, or as the run was begun; `saebench store info` says how many)"""
    seed: tuple[int, ...] = (0,)
    """fixes initialisation, one SAE for each; the first also fixes the order of the data"""
    dtype: Precision = "float32"
    """of the encoder's product: tf32 and bfloat16 for GPUs that have them; weights stay float32 (on the demo bfloat16 changed FVU by at most 0.0004)"""
    device: str | None = None
    """cuda or cpu (default: cuda where it is at hand)"""
    ranks: Over | None = None
    """what several processes that torchrun started share: the SAEs of a grid, dealt out; the rows of each batch; or the latents of each SAE, for one that outgrows a device (default: grid, or latents where there are fewer SAEs than processes)"""
    partitions: Count | None = None
    """disjoint parts of the store's rows, each of which gives as many rows of every batch: of processes that share rows each reads its own, and one process with as many has the same batches (default: as many as there are such processes, else 1; or as the run was begun)"""
    share: int | None = None
    """processes that share each SAE by rows or latents, where the grid is dealt out to several such circles (default: all of them)"""
    replicas: int | None = None
    """with --ranks latents, how many times such circles hold each SAE's latents, to take as many parts of the rows of every batch (default: once)"""

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "expansion", "memory_gb", "buffer_rows", "partitions"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected more than 0")
        if self.memory_gb is not None and self.buffer_rows is not None:
            raise ValueError(
                f"memory_gb is {self.memory_gb:g} and buffer_rows {self.buffer_rows}; expected one of them: either follows from the other"
            )
        if self.share is not None and (self.share < 2 or self.ranks == "grid"):
            of = " of a grid that is dealt out" * (self.ranks == "grid")
            raise ValueError(
                f"share is {self.share}{of}; expected at least 2 processes, with --ranks rows or latents, for each SAE"
            )
        if self.replicas is not None and (self.replicas < 2 or self.ranks in ("grid", "rows")):
            raise ValueError(
                f"replicas is {self.replicas} with ranks {self.ranks}; expected at least 2, with --ranks latents: by grid and rows each "
                "process has SAEs whole"
            )
        if self.rolling is not None and self.rolling < 3:
            raise ValueError(
                f"rolling is {self.rolling}; expected at least 3 shards: one of the store and two windows behind it"
            )
        if self.rolling is not None and self.partitions is not None:
            raise ValueError(
                f"partitions is {self.partitions} and rolling is {self.rolling}; expected one of them: windows are read by one process"
            )
        for lr in self.lr:
            if not lr > 0:
                raise ValueError(f"lr is {lr}; expected more than 0")
        for name in ("warmup", "decay"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a share of the steps, from 0 to 1")
        if self.exclude_outliers is not None and not self.exclude_outliers > 1:
            raise ValueError(
                f"exclude_outliers is {self.exclude_outliers}; expected more than 1: it is a multiple of the median norm"
            )
        self._check_beside()
        self._check_ends()
        if not self.k and not self.target_l0 and not self.l1:
            raise ValueError(
                "no sparsity given; expected --k 16,32 for topk and its kin, --target-l0 32 or --l1 2 for the others"
            )

    def _check_beside(self) -> None:
        """Raises ValueError for hooks of a second store where there is none, and for what cannot be trained on two."""
        if named := [hook for hook in (*self.hook, *self.reads, *self.writes) if hook.startswith(TUNED)]:
            raise ValueError(
                f"hook is {named[0]!r}, of a second model's store; expected {named[0].removeprefix(TUNED)!r}, "
                "with --kind crosscoder and --beside STORE: both models are read and written"
            )
        if self.beside is not None and (self.kind != "crosscoder" or self.reads or not self.hook):
            raise ValueError(
                f"beside is {self.beside} of what does not read and write both models; expected --kind crosscoder and --hook alone: "
                "its rows of the one are no input for those of the other"
            )
        if self.beside is not None and self.rolling is not None:
            raise ValueError(f"beside is {self.beside} and rolling is {self.rolling}; expected two finished stores")

    def _check_ends(self) -> None:
        """Raises ValueError for what is no description of one kind of dictionary."""
        reads, writes = ",".join(self.reads), ",".join(self.writes)
        if bool(reads) != bool(writes):
            raise ValueError(
                f"reads is {reads!r} and writes is {writes!r}; expected both, or neither: --kind transcoder --layers 3 and --hook name them, too"
            )
        if reads and (self.hook or self.layers):
            raise ValueError(
                f"reads is {reads!r} beside hook or layers; expected one of them: all say where a dictionary is"
            )
        for name in ("reads", "writes", "hook"):
            if twice := [hook for n, hook in enumerate(getattr(self, name)) if hook in getattr(self, name)[:n]]:
                raise ValueError(f"{name} has {twice[0]} twice; expected each hook once")
        if reads and self.kind not in ("sae", "clt") and (self.kind == "crosscoder") != (self.reads == self.writes):
            raise ValueError(
                f"kind is {self.kind} and reads is {reads!r}, writes {writes!r}; expected the same of a crosscoder, other hooks of a transcoder"
            )
        if self.kind in ("transcoder", "clt") and self.hook:
            raise ValueError(
                f"hook is {','.join(self.hook)!r} of a {self.kind}; expected --layers{', or --reads and --writes' * (self.kind == 'transcoder')}"
            )
        if self.kind == "clt" and (reads or len(self.layers) == 1):
            named = f"reads is {reads!r}" if reads else f"layers is {self.layers}"
            raise ValueError(f"{named} of a clt; expected --layers, two or more of them: of one it is a transcoder")
        if self.kind == "crosscoder" and len(self.hook or self.reads) < 2 and self.beside is None:
            raise ValueError(
                f"hook is {','.join(self.hook)!r} of a crosscoder; expected two or more: of one it is an SAE"
            )
        if self.layers and self.kind not in ("transcoder", "clt"):
            raise ValueError(f"layers is {self.layers} of a {self.kind}; expected --hook, or --kind transcoder or clt")
        if self.skip and self.reads == self.writes and self.kind not in ("transcoder", "clt"):
            raise ValueError(
                "skip is True of what writes what it reads, where a linear map is all: use it with --kind transcoder"
            )
        if self._writes_several and "topk" in self.arch:
            raise ValueError(
                "arch is topk where several hooks are written; expected batchtopk or another: its latents compete by their "
                "activations, which change against each other as each hook's scale is folded into the weights"
            )

    @property
    def _writes_several(self) -> bool:
        return self.kind in ("crosscoder", "clt") or len(self.writes) > 1

    @property
    def architectures(self) -> tuple[Architecture, ...]:
        """As asked, or the default."""
        return self.arch or (("batchtopk",) if self._writes_several else ("topk",))

    def places(self, hooks: Sequence[str]) -> tuple[Place, ...]:
        """Where the dictionaries are, in a store that has these hooks. Raises ValueError where it lacks one, or does not say which."""
        if self.reads:
            one = Ends(self.reads, self.writes)
            places: tuple[Place, ...] = one.reads if one.tied and len(one.reads) == 1 else (one,)
        elif self.kind == "crosscoder":
            both = self.hook + (tuple(TUNED + hook for hook in self.hook) if self.beside else ())
            places = (Ends(both, both),)
        elif self.kind in ("transcoder", "clt"):
            layers = sorted(set(self.layers or _layers_of_mlps(hooks)))
            if self.kind == "clt" and len(layers) == 1:
                raise ValueError(
                    f"{self.store} has the MLP of one layer, {layers[0]}; expected two or more for a clt: {_REMEDY}"
                )
            last = len(layers) if self.kind == "clt" else 1
            places = tuple(
                Ends((_MLP[0].format(layer),), tuple(_MLP[1].format(later) for later in layers[n : n + last]))
                for n, layer in enumerate(layers)
            )
        elif self.hook or len(hooks) == 1:
            places = self.hook or tuple(hooks)
        else:
            raise ValueError(f"{self.store} has several hooks; choose one with --hook: {', '.join(hooks)}")
        for hook in (hook for place in places for hook in ((place,) if isinstance(place, str) else place.hooks)):
            if hook not in hooks:
                folder = self.beside if hook.startswith(TUNED) else self.store
                raise ValueError(f"hook {hook!r} is not in {folder}; it has {', '.join(hooks)}: {_REMEDY}")
        if not places:
            raise ValueError(f"{self.store} has no MLP's input and output; it has {', '.join(hooks)}: {_REMEDY}")
        return places

    @property
    def n_steps(self) -> int:
        return math.ceil(self.tokens / self.batch)

    def rows_of_a_buffer(self, row_bytes: int) -> int:
        """Of the two that rows are shuffled in, where a row of all hooks has so many bytes: as asked, or `BUFFER_ROWS`, or more
        where 2 GB hold more, or fewer where half of the machine's memory does not hold that."""
        if self.buffer_rows is not None:
            return self.buffer_rows
        within = [math.ceil(gb * 2**30 / (2 * row_bytes)) for gb in (self.memory_gb or 2.0, total_memory() / 2**31)]
        return within[0] if self.memory_gb is not None else max(1, min(max(BUFFER_ROWS, within[0]), within[1]))

    def dead_steps(self, spec: Spec) -> int:
        """Steps without firing after which a latent counts as dead."""
        return dead_steps_of(spec, self.tokens, self.batch, self.dead_tokens)


_REMEDY = "harvest a store that has all of them (`saebench harvest --layers 3 --kinds mlp` takes what goes into an MLP and comes out of it)"


def _layers_of_mlps(hooks: Iterable[str]) -> tuple[int, ...]:
    """Those whose MLP's input and output are among these hooks."""
    layers = {int(found[1]) for hook in hooks if (found := re.match(r"blocks\.(\d+)\.", hook))}
    return tuple(layer for layer in sorted(layers) if all(name.format(layer) in hooks for name in _MLP))


_ROOMY = 8  # latents to a dimension, beyond which the learning rate falls


def schedule_of(
    arch: str, d_in: int, d_sae: int, n_steps: int, lr: float | None = None, decay: float | None = None
) -> dict[str, Any]:
    """`lr`, `decay`, `edition` and `pace` of what is begun now, by what is said and else by the edition of its recipe."""
    edition = EDITIONS[RECIPES[arch].edition]
    crowd = min(1.0, _ROOMY * d_in / d_sae) ** edition.crowded
    rate = lr or edition.rate * crowd * default_learning_rate(d_in, n_steps)
    return {
        "lr": rate,
        "decay": edition.decay if decay is None else decay,
        "edition": RECIPES[arch].edition,
        "pace": pace(rate, d_in),
    }


def dead_steps_of(spec: Spec, tokens: int, batch: int, dead_tokens: int | None = None) -> int:
    """Steps without firing after which a latent counts as dead, by what is said and else by the length of the run."""
    part = EDITIONS[spec.edition].dead if RECIPES[spec.architecture].takes_k else RESAMPLED
    return math.ceil((dead_tokens or min(10_000_000, tokens / part)) / batch)


def grid(config: TrainConfig, d_in: int, places: Sequence[Place] = ("",)) -> list[Spec]:
    """The SAEs that a config describes: architectures × sparsities × widths × learning rates × seeds × controls × places.

    Names say what differs within the grid. Raises ValueError when an architecture gets no sparsity, or k > d_sae.
    """
    widths, joint = config.d_sae or (config.expansion * d_in,), config.kind == "clt"
    specs: list[Spec] = []
    for place, d_sae, lr, seed, control, arch in product(
        places, widths, config.lr or (None,), config.seed, config.control or ("",), config.architectures
    ):
        if RECIPES[arch].takes_k:
            levels: list[dict[str, Any]] = [{"k": k} for k in (*config.k, *(round(l0) for l0 in config.target_l0))]
        else:
            levels = [{"target_l0": l0} for l0 in config.target_l0] + [{"l1": l1} for l1 in config.l1]
        if not levels:
            raise ValueError(
                f"architecture {arch} has no sparsity; expected {'--k' if RECIPES[arch].takes_k else '--target-l0 or --l1'}"
            )
        for level in levels:
            (sparsity, value), *_ = level.items()
            if not 0 < value <= (d_sae if sparsity != "l1" else math.inf):
                raise ValueError(f"{sparsity} is {value}; expected more than 0 and at most d_sae = {d_sae}")
            name = f"{arch}-{ {'k': 'k', 'target_l0': 'l0-', 'l1': 'l1-'}[sparsity] }{value:g}"
            name += f"-f{d_sae}" if len(widths) > 1 else ""
            name += f"-lr{lr:g}" if len(config.lr) > 1 else ""
            name += f"-{control}" if control else ""
            name += f"-seed{seed}" if len(config.seed) > 1 else ""
            where: dict[str, Any] = {"hook": place}
            if isinstance(place, Ends):
                kind = "clt" if joint else "crosscoder" if place.tied else "transcoder"
                name += f"{'-skip' * config.skip}-{kind}"
                where = {"reads": place.reads, "writes": place.writes, "skip": config.skip, "joint": joint}
                where["set"] = name if len(places) > 1 and not place.tied else ""
            if len(places) > 1:
                name += f"-{place if isinstance(place, str) else '+'.join(place.reads if joint else place.writes)}"
            schedule = schedule_of(arch, d_in, d_sae, config.n_steps, lr, config.decay) | {"warmup": config.warmup}
            if sparsity != "target_l0":
                del schedule["pace"]
            specs.append(
                Spec(
                    name=name, architecture=arch, d_sae=d_sae, seed=seed, control=control,
                    **where, **schedule, **level,
                )
            )  # fmt: skip
    return list({spec.name: spec for spec in specs}.values())
