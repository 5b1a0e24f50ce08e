"""One pass over held-out contexts: sums of the clean, the ablated and every spliced model's losses, and of each dictionary's errors.

The model runs whole once per batch and hook written; each arm runs only what lies behind the hook. Logits are made at scored
positions alone, some at a time, for all arms together.

B contexts, L positions, D what is read, E what is written, F latents, N replaced vectors and P scored positions of a batch, V vocabulary.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saebench.evaluate.baselines import Baseline, joined
from saebench.metrics import Sums, loss_and_kl, reconstruction_terms
from saebench.models import (
    CleanPass,
    LanguageModel,
    clean_pass,
    edits,
    head,
    resumed_states,
    resumes,
    spliced_states,
)
from saebench.runlog import progress
from saebench.sae import SAE, Ends, TopKSAE, encode_sparse, part, reconstruct_sparse
from saebench.store import Store

_log = logging.getLogger(__name__)
_ROWS = 8192  # rows encoded at once
_LOGITS = 2**25  # logits of an arm held at once: 128 MiB in float32
_POSITIONS = 4096  # of a pass: what layers and arms hold grows with them

ByHook = dict[str, Tensor]
"""Something of each hook: vectors `[N, D]`, or a number for each row `[N]`."""


class Batch(NamedTuple):
    """Validation contexts: tokens, document and keep flag of every position."""

    tokens: Int[Tensor, "B L"]
    doc_id: Int[Tensor, "B L"]
    keep: Bool[Tensor, "B L"]


def validation_batches(store: Store, tokens: int, contexts: int) -> Iterator[Batch]:
    """The store's validation contexts in order, up to `tokens` of their positions: at most `contexts` at once, fewer where they are long."""
    contexts = max(1, min(contexts, _POSITIONS // store.context))
    left = max(1, tokens // store.context)
    for shard in store.of_split("validation"):
        columns = [torch.from_numpy(shard.column(name).copy()) for name in ("tokens", "doc_id", "keep")]
        shaped = [rearrange(column, "(b l) -> b l", l=store.context)[:left] for column in columns]
        left -= len(shaped[0])
        for start in range(0, len(shaped[0]), contexts):
            token, doc, keep = (column[start : start + contexts] for column in shaped)
            yield Batch(token.long(), doc.long(), keep)


class Places(NamedTuple):
    """Where vectors of a batch are replaced, and where losses are taken."""

    usual_BL: Bool[Tensor, "B L"]
    """kept, and massive at none of the hooks"""
    scored_BL: Bool[Tensor, "B L"]
    """those of them that an ordinary token follows"""
    massive_BL: Bool[Tensor, "B L"]
    """kept, and massive at one of the hooks"""

    @classmethod
    def of(cls, batch: Batch, values: Mapping[str, Tensor], bounds: Mapping[str, float]) -> "Places":
        """`values` are the vectors at each hook, `[B, L, D]`; longer ones than its bound are massive."""
        keep_BL, usual_BL = batch.keep, batch.keep.clone()
        for hook, value in values.items():
            usual_BL &= value.float().norm(dim=2) <= bounds[hook]
        scored_BL = usual_BL.clone()
        scored_BL[:, :-1] &= keep_BL[:, 1:]  # a special token is no fair thing to predict
        scored_BL[:, -1] = False
        return cls(usual_BL, scored_BL, keep_BL & ~usual_BL)


def splice(
    x_BLD: Float[Tensor, "B L D"], where: Bool[Tensor, "B L"], rows_ND: Float[Tensor, "N D"]
) -> Float[Tensor, "B L D"]:
    """The vectors with `rows_ND` at some positions, and as they are at the others."""
    out_BLD = x_BLD.clone()
    out_BLD[where] = rows_ND.to(x_BLD.dtype)
    return out_BLD


@contextlib.contextmanager
def seen(model: LanguageModel, hooks: Sequence[str]) -> Iterator[ByHook]:
    """The vectors `[B, L, D]` at some hooks, of the pass that was run in it last."""
    values: ByHook = {}

    def take(hook: str, value: Tensor) -> None:
        values[hook] = value.clone()  # later layers may add to it in place

    with edits(model, {hook: partial(take, hook) for hook in hooks})():
        yield values


class Written(NamedTuple):
    """What a subject makes of rows."""

    rows: ByHook
    """what it writes at each hook, `[N, D]`"""
    l0: Tensor
    """active latents of each row, `[N]`"""
    l1: ByHook
    """Σ_j |f_j|‖d_j‖ of each row, d_j what latent j writes at the hook, `[N]`"""


class Dictionary:
    """An SAE, a transcoder or a crosscoder, and how often each of its latents fired."""

    def __init__(self, folder: Path, sae: SAE, ends: Ends, *, refitted: bool = False) -> None:
        """`refitted`: with the coefficients that are best for the latents that fire, in place of the encoder's."""
        self.folder, self.sae, self.ends, self.refitted = folder, sae, ends, refitted
        self.lengths = dict(zip(ends.writes, sae.lengths_FH.unbind(1), strict=True))
        self.fires_F = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.W_dec.device)

    def write(self, rows: ByHook, *, count: bool) -> Written:
        """What it makes of the rows of the hooks that it reads; counts what fires."""
        parts = []
        for x_ND in joined(rows, self.ends.reads).split(_ROWS):
            y_hat, code, values = reconstruct_sparse(self.sae, x_ND, refitted=self.refitted)
            if count:
                self.fires_F += code.latents.bincount(minlength=self.sae.d_sae)
            l1 = [
                torch.zeros_like(x_ND[:, 0]).index_add_(0, code.rows, values.abs() * code.at(lengths_F))
                for lengths_F in self.lengths.values()
            ]
            parts.append((y_hat, code.offsets.diff(), *l1))
        y_hat, l0, *l1 = (torch.cat(column) for column in zip(*parts, strict=True))
        hooks = self.ends.writes
        by_hook = dict(zip(hooks, y_hat.split(self.sae.parts, dim=1), strict=True))
        return Written(by_hook, l0, dict(zip(hooks, l1, strict=True)))


class Subject:
    """What is evaluated, a dictionary or several that stand in together, and the sums that belong to it alone, of each hook written."""

    def __init__(self, folder: Path, members: Sequence[Dictionary], ends: Ends) -> None:
        """`folder` is where its figures go."""
        self.folder, self.members, self.ends = folder, members, ends
        self.sums = {hook: Sums() for hook in ends.writes}

    def refitted(self) -> "Subject":
        """The same dictionaries, refitted, with sums of their own."""
        members = [Dictionary(one.folder, one.sae, one.ends, refitted=True) for one in self.members]
        return Subject(self.folder, members, self.ends)

    def reconstruct(self, rows: ByHook, *, count: bool = True) -> Written:
        """What the members make of the rows of each hook read, added up where they write to the same hook; counts what fires."""
        made, *others = [member.write(rows, count=count) for member in self.members]
        for other in others:
            made = Written(added(made.rows, other.rows), made.l0 + other.l0, added(made.l1, other.l1))
        return made


def added(left: ByHook, right: ByHook) -> ByHook:
    """Both, and at hooks that are in both their sum."""
    return left | {hook: left[hook] + value if hook in left else value for hook, value in right.items()}


class Measurement:
    """What is summed over the batches: at each hook written `shared` for all subjects, `subject.sums` for each, and the baseline.

    Each hook written has arms of its own, in which it alone is replaced. Vectors of a norm above its bound at any hook are
    massive: treated as those of special tokens are, and counted in sums of their own.
    """

    def __init__(
        self,
        model: LanguageModel,
        ends: Ends,
        means: ByHook,
        baseline: Baseline | None,
        subjects: Sequence[Subject],
        bounds: Mapping[str, float],
    ) -> None:
        """`means` are those of the rows written, `[D]`."""
        self.model, self.ends, self.means, self.baseline, self.subjects = model, ends, means, baseline, subjects
        self.bounds = bounds
        self.shared = {hook: Sums() for hook in ends.writes}
        self._clean: dict[str, CleanPass] = {}

    def add(self, batch: Batch) -> None:
        """Run the clean, the zero-ablated, the mean-ablated and each subject's spliced models on a batch."""
        values, states_BLD = self.clean(batch.tokens)
        places = Places.of(batch, values, self.bounds)
        usual_BL, scored_BL = places.usual_BL, places.scored_BL
        following_P = batch.tokens.roll(-1, 1)[scored_BL]
        docs_N, docs_P = batch.doc_id[usual_BL], batch.doc_id[scored_BL]
        rows = {hook: value[usual_BL].float() for hook, value in values.items()}
        written = []
        for subject in self.subjects:
            made = subject.reconstruct(rows)
            for hook, sums in subject.sums.items():
                sums.add(docs_N, reconstruction_terms(rows[hook], made.rows[hook], made.l0, made.l1[hook]))
            written.append(made.rows)
        for hook, sums in self.shared.items():
            squared_norm_N = rows[hook].double().pow(2).sum(1)
            sums.add(docs_N, {"rows": torch.ones_like(docs_N), "squared_norm": squared_norm_N, "vector": rows[hook]})
        arms = self.arms(batch.tokens, places, written)
        each = [arm for of_place in arms.values() for arm in of_place]
        clean_P, found = losses(self.model, states_BLD[scored_BL], each, following_P)
        pairs = iter(found)
        for hooks, of_place in arms.items():
            (zero_P, kl_zero_P), (mean_P, _), *spliced = (next(pairs) for _ in of_place)
            terms = {"positions": torch.ones_like(docs_P), "ce_clean": clean_P, "ce_zero": zero_P, "ce_mean": mean_P}
            for hook in hooks:
                self.shared[hook].add(docs_P, terms | {"kl_zero": kl_zero_P})
                for subject, (ce_P, kl_P) in zip(self.subjects, spliced, strict=True):
                    subject.sums[hook].add(docs_P, {"ce_spliced": ce_P, "kl": kl_P})
        if self.baseline is not None:
            self.baseline.observe(joined(rows, self.ends.reads), joined(rows, self.ends.writes))
        if bool(places.massive_BL.any()):
            massive = {hook: value[places.massive_BL].float() for hook, value in values.items()}
            self._count_massive(massive, batch.doc_id[places.massive_BL])

    def clean(self, tokens: Int[Tensor, "B L"]) -> tuple[ByHook, Float[Tensor, "B L D"]]:
        """(the vectors at every hook, `[B, L, D]`, those that logits are made of) of the model as it is."""
        with seen(self.model, [hook for hook in self.ends.reads if hook not in self.ends.writes]) as values:
            self._clean = {hook: clean_pass(self.model, tokens, hook) for hook in self.ends.writes}
        values |= {hook: clean.value for hook, clean in self._clean.items()}
        return values, next(iter(self._clean.values())).states

    def arms(
        self, tokens: Int[Tensor, "B L"], places: Places, written: Sequence[ByHook]
    ) -> dict[tuple[str, ...], list[Float[Tensor, "P D"]]]:
        """For the hooks that are replaced at once, what logits are made of: with zeros there, with the mean, with what each
        subject has written."""
        n, found = int(places.usual_BL.sum()), {}
        for hook, clean in self._clean.items():
            run = resumed_states if self._resumes(hook) else spliced_states
            mean_ND = self.means[hook].expand(n, -1)
            replaced = (torch.zeros_like(mean_ND), mean_ND, *(rows[hook] for rows in written))
            values = (splice(clean.value, places.usual_BL, rows_ND) for rows_ND in replaced)
            found[(hook,)] = [run(self.model, clean, value)[places.scored_BL] for value in values]
        return found

    def _resumes(self, hook: str) -> bool:
        """Whether a pass may begin at a hook."""
        if not (found := resumes(self.model, hook)) and not self.shared[hook].index:
            _log.warning("%s has layers that read more than the stream: every arm runs it whole", self.model.id)
        return found

    def _count_massive(self, values: ByHook, docs_M: Int[Tensor, " M"]) -> None:
        """What figures over all rows need beside the sums of the others."""
        for hook, sums in self.shared.items():
            squared_norm_M = values[hook].double().pow(2).sum(1)
            terms = {"massive_rows": torch.ones_like(docs_M), "massive_norm": squared_norm_M}
            sums.add(docs_M, terms | {"massive_vector": values[hook]})
        for subject in self.subjects:
            made = subject.reconstruct(values, count=False)
            for hook, sums in subject.sums.items():
                sums.add(docs_M, {"massive_error": (values[hook] - made.rows[hook]).double().pow(2).sum(1)})


def losses(
    model: LanguageModel,
    clean_PD: Float[Tensor, "P D"],
    arms: Sequence[Float[Tensor, "P D"]],
    following_P: Int[Tensor, " P"],
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """(loss of the clean model, (loss, KL) of each arm) at each position, from the vectors that logits are made of."""
    step = max(1, _LOGITS // model.n_vocab)
    clean: list[Tensor] = []
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in arms]
    for start in range(0, max(1, len(clean_PD)), step):  # once where nothing is scored
        part = slice(start, start + step)
        log_p = head(model, clean_PD[part]).float().log_softmax(-1)
        clean.append(-log_p.gather(1, following_P[part, None]).squeeze(1))
        for arm_PD, pairs in zip(arms, found, strict=True):
            pairs.append(loss_and_kl(log_p, head(model, arm_PD[part]), following_P[part]))
    joint = [(torch.cat(ces), torch.cat(kls)) for ces, kls in (zip(*arm, strict=True) for arm in found)]
    return torch.cat(clean), joint


@torch.inference_mode()
def silent_latents(store: Store, ends: Ends, dictionaries: Sequence[Dictionary], rows: int) -> tuple[list[Tensor], int]:
    """Which latents fired neither on the held-out rows nor on the first `rows` training rows, massive ones apart; and how many those are.

    Latents once few are watched alone, and only rows on which one of them may fire are encoded whole.
    """
    silent = [one.fires_F == 0 for one in dictionaries]
    rows, seen = min(rows, store.rows("train", kept=True)), 0
    watches = [_watch(one, silent_F) for one, silent_F in zip(dictionaries, silent, strict=True)]
    with progress(rows, "count dead latents", "row") as bar:
        for some in store.joint_rows(ends.hooks, "train", first=rows):
            if not any(silent_F.any() for silent_F in silent):
                seen = rows  # what came after could change nothing
                break
            chunk = joined(some, ends.reads)
            seen += len(chunk)
            for place, (one, silent_F) in enumerate(zip(dictionaries, silent, strict=True)):
                x_ND = chunk.to(silent_F.device)
                if not silent_F.any() or not len(x_ND := x_ND[watches[place](x_ND)]):
                    continue
                code, _ = encode_sparse(one.sae, x_ND)
                still_F = silent_F & (code.latents.bincount(minlength=len(silent_F)) == 0)
                if not torch.equal(still_F, silent_F):
                    silent[place], watches[place] = still_F, _watch(one, still_F)
            bar.update(len(chunk))
    return silent, seen


def _watch(one: Dictionary, silent_F: Bool[Tensor, " F"]) -> Callable[[Tensor], Tensor]:
    """Rows `[N, D]` -> which of them may make a silent latent fire, at a fraction of the encoder's cost.

    A TopK latent fires only above the k-th largest of all, so above the k-th largest of any others: of the busiest.
    """
    sae = one.sae
    k = sae.k if isinstance(sae, TopKSAE) else 0
    busy = one.fires_F.topk(min(8 * k, sae.d_sae)).indices
    if int(silent_F.sum()) + len(busy) > sae.d_sae / 2:
        return lambda x_ND: torch.ones_like(x_ND[:, 0], dtype=torch.bool)
    watched, rivals = part(sae, silent_F.nonzero().squeeze(1)), part(sae, busy)

    def may_fire(x_ND: Tensor) -> Tensor:
        strongest_N = watched.encode(x_ND).amax(1)
        if not k:
            return strongest_N > 0
        bound_N = rivals.encode(x_ND).topk(k, dim=-1).values[:, -1]
        return (strongest_N > 0) & (strongest_N >= 0.999 * bound_N)  # a product's rounding depends on its shape

    return may_fire
