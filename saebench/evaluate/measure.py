"""One pass over held-out contexts: sums of the clean, the ablated and every spliced model's losses, and of each SAE's errors.

The model runs whole once per batch; each arm runs only what lies behind the hook.

B contexts, L positions, D d_in, F latents, N kept tokens of a batch, V vocabulary.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saebench.evaluate.baselines import PCA
from saebench.metrics import Sums, loss_and_kl, next_token_loss, reconstruction_terms
from saebench.models import LanguageModel, spliced_logits
from saebench.resume import CleanPass, clean_pass, resumed_logits, resumes
from saebench.runlog import progress
from saebench.sae import SAE, TopKSAE, new_sae
from saebench.store import Store

_log = logging.getLogger(__name__)
_ROWS = 8192  # rows encoded at once, to bound memory at wide SAEs


class Batch(NamedTuple):
    """Validation contexts: tokens, document and keep flag of every position."""

    tokens: Int[Tensor, "B L"]
    doc_id: Int[Tensor, "B L"]
    keep: Bool[Tensor, "B L"]

    @property
    def scored(self) -> Bool[Tensor, "B P"]:
        """Positions whose next-token loss counts; P = L - 1."""
        return self.keep[:, :-1]


def validation_batches(store: Store, tokens: int, contexts: int) -> Iterator[Batch]:
    """The store's validation contexts in order, up to `tokens` of them."""
    left = max(1, tokens // store.context)
    for shard in store.of_split("validation"):
        columns = [torch.from_numpy(shard.column(name).copy()) for name in ("tokens", "doc_id", "keep")]
        shaped = [column.view(-1, store.context)[:left] for column in columns]
        left -= len(shaped[0])
        for start in range(0, len(shaped[0]), contexts):
            token, doc, keep = (column[start : start + contexts] for column in shaped)
            yield Batch(token.long(), doc.long(), keep)


def splice(
    x_BLD: Float[Tensor, "B L D"], keep: Bool[Tensor, "B L"], rows_ND: Float[Tensor, "N D"]
) -> Float[Tensor, "B L D"]:
    """Kept positions become `rows_ND`, special tokens stay as they are."""
    out_BLD = x_BLD.clone()
    out_BLD[keep] = rows_ND.to(x_BLD.dtype)
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
            out = self.sae(rows)
            row, latent = out.acts.nonzero(as_tuple=True)  # few: cheaper to find once than to sum all thrice
            self.fires_F += latent.bincount(minlength=self.sae.d_sae)
            weighted = out.acts[row, latent].abs() * self.norms_F[latent]
            l1 = torch.zeros_like(rows[:, 0]).index_add_(0, row, weighted)
            parts.append((out.x_hat, row.bincount(minlength=len(rows)), l1))
        x_hat, l0, l1 = (torch.cat(column) for column in zip(*parts, strict=True))
        return x_hat, l0, l1


class Measurement:
    """What is summed over the batches of one hook: `shared` for all SAEs, `subjects` for each, and the PCA."""

    def __init__(
        self, model: LanguageModel, hook: str, mean_D: Float[Tensor, " D"], pca: PCA, subjects: list[Subject]
    ) -> None:
        self.model, self.hook, self.mean_D, self.pca, self.subjects = model, hook, mean_D, pca, subjects
        self.shared = Sums()
        self._resume: bool | None = None

    def add(self, batch: Batch) -> None:
        """Run the clean, the zero-ablated, the mean-ablated and each SAE's spliced model on a batch."""
        tokens, keep, scored = batch.tokens, batch.keep, batch.scored
        clean = clean_pass(self.model, tokens, self.hook)
        x_ND = clean.value[keep].float()
        log_p = clean.logits.float().log_softmax(-1)
        docs_N, docs_P = batch.doc_id[keep], batch.doc_id[:, :-1][scored]

        def ce_and_kl(rows_ND: Tensor) -> tuple[Tensor, Tensor]:
            loss, kl = loss_and_kl(log_p, self._logits(clean, splice(clean.value, keep, rows_ND)), tokens)
            return loss[scored], kl[:, :-1][scored]

        squared_norm = x_ND.double().pow(2).sum(1)
        self.shared.add(docs_N, {"rows": torch.ones_like(docs_N), "squared_norm": squared_norm, "vector": x_ND})
        ce_zero, kl_zero = ce_and_kl(torch.zeros_like(x_ND))
        self.shared.add(
            docs_P,
            {
                "positions": torch.ones_like(docs_P),
                "ce_clean": next_token_loss(log_p, tokens)[scored],
                "ce_zero": ce_zero,
                "ce_mean": ce_and_kl(self.mean_D.expand_as(x_ND))[0],
                "kl_zero": kl_zero,
            },
        )
        self.pca.observe(x_ND)
        for subject in self.subjects:
            x_hat_ND, l0_N, l1_N = subject.reconstruct(x_ND)
            ce_spliced, kl = ce_and_kl(x_hat_ND)
            subject.sums.add(docs_N, reconstruction_terms(x_ND, x_hat_ND, l0_N, l1_N))
            subject.sums.add(docs_P, {"ce_spliced": ce_spliced, "kl": kl})

    def _logits(self, clean: CleanPass, value_BLD: Tensor) -> Tensor:
        """Logits of the model with `value_BLD` at the hook; the first batch decides whether blocks may be skipped."""
        if self._resume is None:
            self._resume = resumes(self.model, clean)
            if not self._resume:
                _log.warning("%s has layers that read more than the stream: every arm runs it whole", self.model.id)
        if self._resume:
            return resumed_logits(self.model, clean, value_BLD)
        return spliced_logits(self.model, clean.tokens, clean.hook, lambda old: value_BLD)


@torch.inference_mode()
def silent_latents(store: Store, hook: str, subjects: list[Subject], rows: int) -> tuple[list[Tensor], int]:
    """Which latents fired neither on the held-out rows nor on up to `rows` training rows; and how many those are.

    Latents once few are watched alone, and only rows on which one of them may fire are encoded whole.
    """
    silent = [subject.fires_F == 0 for subject in subjects]
    rows = min(rows, store.rows("train", kept=True))
    watches = [_watch(subject, silent_F) for subject, silent_F in zip(subjects, silent, strict=True)]
    with progress(rows, "count dead latents", "row") as bar:
        for chunk in store.kept_rows(hook, "train", rows, _ROWS):
            if not any(silent_F.any() for silent_F in silent):
                break
            for place, (subject, silent_F) in enumerate(zip(subjects, silent, strict=True)):
                x_ND = chunk.to(silent_F.device)
                if not silent_F.any() or not len(x_ND := x_ND[watches[place](x_ND)]):
                    continue
                still_F = silent_F & (subject.sae.encode(x_ND) == 0).all(0)
                if not torch.equal(still_F, silent_F):
                    silent[place], watches[place] = still_F, _watch(subject, still_F)
            bar.update(len(chunk))
    return silent, rows


def _watch(subject: Subject, silent_F: Bool[Tensor, " F"]) -> Callable[[Tensor], Tensor]:
    """Rows `[N, D]` -> which of them may make a silent latent fire, at a fraction of the encoder's cost.

    A TopK latent fires only above the k-th largest of all, so above the k-th largest of any others: of the busiest.
    """
    sae = subject.sae
    k = sae.k if isinstance(sae, TopKSAE) else 0
    busy = subject.fires_F.topk(min(8 * k, sae.d_sae)).indices
    if int(silent_F.sum()) + len(busy) > sae.d_sae / 2:
        return lambda x_ND: torch.ones_like(x_ND[:, 0], dtype=torch.bool)
    watched, rivals = _only(sae, silent_F.nonzero().squeeze(1)), _only(sae, busy)

    def may_fire(x_ND: Tensor) -> Tensor:
        strongest_N = watched.encode(x_ND).amax(1)
        if not k:
            return strongest_N > 0
        bound_N = rivals.encode(x_ND).topk(k, dim=-1).values[:, -1]
        return (strongest_N > 0) & (strongest_N >= 0.999 * bound_N)  # a product's rounding depends on its shape

    return may_fire


def _only(sae: SAE, latents: Int[Tensor, " n"]) -> SAE:
    """The SAE of some latents; for a TopK one without the competition, as ReLU."""
    architecture = "relu" if isinstance(sae, TopKSAE) else sae.architecture
    part = new_sae(architecture, sae.d_in, len(latents), normalize=sae.normalize).to(latents.device)
    for name, parameter in part.named_parameters():
        whole = sae.get_parameter(name)
        parameter.copy_(whole if name == "b_dec" else whole[:, latents] if name == "W_enc" else whole[latents])
    return part
