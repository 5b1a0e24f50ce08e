"""One pass over held-out contexts: sums of the clean, the ablated and every spliced model's losses, and of each SAE's errors.

The model runs whole once per batch; each arm runs only what lies behind the hook. Logits are made at scored positions alone, some
at a time, for all arms together.

B contexts, L positions, D d_in, F latents, N replaced vectors and P scored positions of a batch, V vocabulary.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saebench.evaluate.baselines import PCA
from saebench.metrics import Sums, loss_and_kl, reconstruction_terms
from saebench.models import CleanPass, LanguageModel, clean_pass, head, resumed_states, resumes, spliced_states
from saebench.runlog import progress
from saebench.sae import SAE, TopKSAE, encode_sparse, part, reconstruct_sparse
from saebench.store import Store

_log = logging.getLogger(__name__)
_ROWS = 8192  # rows encoded at once
_LOGITS = 2**25  # logits of an arm held at once: 128 MiB in float32
_POSITIONS = 4096  # of a pass: what layers and arms hold grows with them


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


def splice(
    x_BLD: Float[Tensor, "B L D"], where: Bool[Tensor, "B L"], rows_ND: Float[Tensor, "N D"]
) -> Float[Tensor, "B L D"]:
    """The vectors with `rows_ND` at some positions, and as they are at the others."""
    out_BLD = x_BLD.clone()
    out_BLD[where] = rows_ND.to(x_BLD.dtype)
    return out_BLD


class Subject:
    """One SAE under evaluation, and the sums that belong to it alone."""

    def __init__(self, folder: Path, sae: SAE) -> None:
        self.folder = folder
        self.sae = sae
        self.norms_F = sae.W_dec.norm(dim=1)
        self.sums = Sums()
        self.fires_F = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.W_dec.device)

    def reconstruct(self, x_ND: Float[Tensor, "N D"]) -> tuple[Tensor, Tensor, Tensor]:
        """(x̂ `[N, D]`, L0 `[N]`, decoder-weighted L1 `[N]`); counts what fires."""
        parts = []
        for rows in x_ND.split(_ROWS):
            x_hat, code, values = reconstruct_sparse(self.sae, rows)
            self.fires_F += code.latents.bincount(minlength=self.sae.d_sae)
            l1 = torch.zeros_like(rows[:, 0]).index_add_(0, code.rows, values.abs() * code.at(self.norms_F))
            parts.append((x_hat, code.offsets.diff(), l1))
        x_hat, l0, l1 = (torch.cat(column) for column in zip(*parts, strict=True))
        return x_hat, l0, l1


class Measurement:
    """What is summed over the batches of one hook: `shared` for all SAEs, `subjects` for each, and the PCA.

    Vectors of a norm above `bound` are massive: treated as those of special tokens are, and counted in sums of their own.
    """

    def __init__(
        self,
        model: LanguageModel,
        hook: str,
        mean_D: Float[Tensor, " D"],
        pca: PCA,
        subjects: list[Subject],
        bound: float = float("inf"),
    ) -> None:
        self.model, self.hook, self.mean_D, self.pca, self.subjects = model, hook, mean_D, pca, subjects
        self.bound = bound
        self.shared = Sums()
        self._resume = resumes(model, hook)
        """whether a pass may begin at the hook"""
        if not self._resume:
            _log.warning("%s has layers that read more than the stream: every arm runs it whole", model.id)

    def add(self, batch: Batch) -> None:
        """Run the clean, the zero-ablated, the mean-ablated and each SAE's spliced model on a batch."""
        tokens, keep_BL = batch.tokens, batch.keep
        clean = clean_pass(self.model, tokens, self.hook)
        usual_BL = keep_BL & (clean.value.float().norm(dim=2) <= self.bound)
        scored_BL = usual_BL.clone()
        scored_BL[:, :-1] &= keep_BL[:, 1:]  # a special token is no fair thing to predict
        scored_BL[:, -1] = False
        following_P = tokens.roll(-1, 1)[scored_BL]
        docs_N, docs_P = batch.doc_id[usual_BL], batch.doc_id[scored_BL]
        x_ND = clean.value[usual_BL].float()

        def states_of(rows_ND: Tensor) -> Tensor:
            return self._states(clean, splice(clean.value, usual_BL, rows_ND))[scored_BL]

        arms = [states_of(torch.zeros_like(x_ND)), states_of(self.mean_D.expand_as(x_ND))]
        for subject in self.subjects:
            x_hat_ND, l0_N, l1_N = subject.reconstruct(x_ND)
            subject.sums.add(docs_N, reconstruction_terms(x_ND, x_hat_ND, l0_N, l1_N))
            arms.append(states_of(x_hat_ND))
        clean_P, found = self._losses(clean.states[scored_BL], arms, following_P)
        (zero_P, kl_zero_P), (mean_P, _), *spliced = found
        squared_norm_N = x_ND.double().pow(2).sum(1)
        self.shared.add(docs_N, {"rows": torch.ones_like(docs_N), "squared_norm": squared_norm_N, "vector": x_ND})
        self.shared.add(
            docs_P,
            {
                "positions": torch.ones_like(docs_P),
                "ce_clean": clean_P,
                "ce_zero": zero_P,
                "ce_mean": mean_P,
                "kl_zero": kl_zero_P,
            },
        )
        self.pca.observe(x_ND)
        for subject, (ce_P, kl_P) in zip(self.subjects, spliced, strict=True):
            subject.sums.add(docs_P, {"ce_spliced": ce_P, "kl": kl_P})
        if bool((massive_BL := keep_BL & ~usual_BL).any()):
            self._count_massive(clean.value[massive_BL].float(), batch.doc_id[massive_BL])

    def _losses(
        self, clean_PD: Float[Tensor, "P D"], arms: list[Float[Tensor, "P D"]], following_P: Int[Tensor, " P"]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """(loss of the clean model, (loss, KL) of each arm) at each position, from the vectors that logits are made of."""
        step = max(1, _LOGITS // self.model.n_vocab)
        clean: list[Tensor] = []
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in arms]
        for start in range(0, max(1, len(clean_PD)), step):  # once where nothing is scored
            part = slice(start, start + step)
            log_p = head(self.model, clean_PD[part]).float().log_softmax(-1)
            clean.append(-log_p.gather(1, following_P[part, None]).squeeze(1))
            for arm_PD, losses in zip(arms, found, strict=True):
                losses.append(loss_and_kl(log_p, head(self.model, arm_PD[part]), following_P[part]))
        joined = [(torch.cat(losses), torch.cat(kls)) for losses, kls in (zip(*arm, strict=True) for arm in found)]
        return torch.cat(clean), joined

    def _count_massive(self, x_MD: Float[Tensor, "M D"], docs_M: Int[Tensor, " M"]) -> None:
        """What figures over all rows need beside the sums of the others."""
        squared_norm_M = x_MD.double().pow(2).sum(1)
        self.shared.add(
            docs_M, {"massive_rows": torch.ones_like(docs_M), "massive_norm": squared_norm_M, "massive_vector": x_MD}
        )
        for subject in self.subjects:
            x_hat_MD = reconstruct_sparse(subject.sae, x_MD)[0]
            subject.sums.add(docs_M, {"massive_error": (x_MD - x_hat_MD).double().pow(2).sum(1)})

    def _states(self, clean: CleanPass, value_BLD: Tensor) -> Tensor:
        """`last_states` of the model with `value_BLD` at the hook."""
        return (resumed_states if self._resume else spliced_states)(self.model, clean, value_BLD)


@torch.inference_mode()
def silent_latents(store: Store, hook: str, subjects: list[Subject], rows: int) -> tuple[list[Tensor], int]:
    """Which latents fired neither on the held-out rows nor on the first `rows` training rows, massive ones apart; and how many those are.

    Latents once few are watched alone, and only rows on which one of them may fire are encoded whole.
    """
    silent = [subject.fires_F == 0 for subject in subjects]
    rows, seen = min(rows, store.rows("train", kept=True)), 0
    watches = [_watch(subject, silent_F) for subject, silent_F in zip(subjects, silent, strict=True)]
    with progress(rows, "count dead latents", "row") as bar:
        for chunk in store.usual_rows(hook, "train", first=rows):
            if not any(silent_F.any() for silent_F in silent):
                seen = rows  # what came after could change nothing
                break
            seen += len(chunk)
            for place, (subject, silent_F) in enumerate(zip(subjects, silent, strict=True)):
                x_ND = chunk.to(silent_F.device)
                if not silent_F.any() or not len(x_ND := x_ND[watches[place](x_ND)]):
                    continue
                code, _ = encode_sparse(subject.sae, x_ND)
                still_F = silent_F & (code.latents.bincount(minlength=len(silent_F)) == 0)
                if not torch.equal(still_F, silent_F):
                    silent[place], watches[place] = still_F, _watch(subject, still_F)
            bar.update(len(chunk))
    return silent, seen


def _watch(subject: Subject, silent_F: Bool[Tensor, " F"]) -> Callable[[Tensor], Tensor]:
    """Rows `[N, D]` -> which of them may make a silent latent fire, at a fraction of the encoder's cost.

    A TopK latent fires only above the k-th largest of all, so above the k-th largest of any others: of the busiest.
    """
    sae = subject.sae
    k = sae.k if isinstance(sae, TopKSAE) else 0
    busy = subject.fires_F.topk(min(8 * k, sae.d_sae)).indices
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
