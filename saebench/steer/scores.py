"""How well each latent of an SAE can be steered with: an input and an output score for all of them.

The two rarely coincide, and only the output score says that turning a latent up brings what it stands for
(Arad et al. 2025, "SAEs Are Good for Steering – If You Select the Right Features").
Legend: P prompts, L positions, D d_in, F latents, f latents of one batch, V vocabulary.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saebench.files import replacing
from saebench.index import FeatureIndex
from saebench.models import LanguageModel
from saebench.resume import clean_pass, resumed_logits, resumes
from saebench.runlog import progress
from saebench.sae import SAE
from saebench.sae.architectures import normalized
from saebench.steer.dose import held_out, top_tokens

_LOGITS = 2**25  # logits held at once
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """What output scores are measured with."""

    strength: float = 0.5
    """of each latent's vector, as a share of the median norm at the hook"""
    prompts: int = 8
    """beginnings of held-out contexts"""
    prompt_tokens: int = 12
    """of each, BOS included"""
    seed: int = 0
    """of their choice"""


class Scores(NamedTuple):
    """Figures of all latents."""

    input: np.ndarray
    """`[F]` F1 of the latent's rule on held-out documents; NaN where it has none"""
    output: np.ndarray
    """`[F]` probability that its top 10 logit tokens gain when it is clamped: mean over prompts, of the next token"""
    rising: np.ndarray
    """`[F]` share of the prompts on which they gain"""


def scores_path(index: FeatureIndex) -> Path:
    """`<sae>.scores.h5` beside the index."""
    return index.path.with_suffix(".scores.h5")


def score(model: LanguageModel, sae: SAE, index: FeatureIndex, config: ScoreConfig = ScoreConfig()) -> Scores:
    """Score every latent, and write `scores_path`. One pass of the layers after the hook per latent and prompt.

    Raises ValueError for an index without logits, a store with too few held-out contexts, and a model whose later layers
    read more than the residual stream.
    """
    picked = torch.as_tensor(top_tokens(index), device=model.device).long()
    prompts = held_out(index.store, config.prompts, config.prompt_tokens, config.seed)
    raw_F = config.strength * index.store.statistics(index.hook)["median_norm"] / sae.W_dec.norm(dim=1)
    gains = torch.zeros(sae.d_sae, len(prompts))
    size = max(1, _LOGITS // (len(prompts) * config.prompt_tokens * model.n_vocab))
    tokens = torch.as_tensor(np.stack(prompts), device=model.device).long()
    clean = clean_pass(model, tokens.repeat(size, 1), index.hook)
    if not resumes(model, clean_pass(model, tokens, index.hook)):
        raise ValueError(f"model {model.id!r} cannot be scored: layers after {index.hook} read more than its output")
    x_PLD = clean.value[: len(prompts)].float()
    with torch.no_grad():
        acts_PLF = sae.encode(x_PLD.flatten(0, 1)).unflatten(0, x_PLD.shape[:2])
        scale = normalized(x_PLD, sae.normalize)[1]
        before_PV = clean.logits[: len(prompts), -1].float().softmax(-1)
        with progress(sae.d_sae, f"score {index.path.stem}", "latent") as bar:
            for start in range(0, sae.d_sae, size):
                latents = torch.arange(start, start + size, device=model.device).clamp(max=sae.d_sae - 1)
                change_fPL = raw_F[latents, None, None] - acts_PLF.movedim(-1, 0)[latents]
                change_fPL[:, :, 0] = 0  # BOS
                edited = x_PLD + (change_fPL[..., None] * scale) * sae.W_dec[latents, None, None]
                logits = resumed_logits(model, clean, edited.flatten(0, 1).to(clean.value.dtype))
                after_fPV = logits[:, -1].float().softmax(-1).unflatten(0, (size, len(prompts)))
                gains[latents.cpu()] = _gain(after_fPV, before_PV, picked[latents]).cpu()
                bar.update(min(size, sae.d_sae - start))
    output = gains.mean(1).numpy()
    found = Scores(
        index.columns.get("rule_f1", np.full(sae.d_sae, np.nan)), output, (gains > 0).float().mean(1).numpy()
    )
    with replacing(scores_path(index)) as temporary, h5py.File(temporary, "w") as file:
        file.attrs.update(version=_VERSION, identity=json.dumps(index.identity), **vars(config))
        for name, values in found._asdict().items():
            file[name] = values.astype(np.float32)
    return found


def _gain(
    after_fPV: Float[Tensor, "f P V"], before_PV: Float[Tensor, "P V"], picked_fk: Tensor
) -> Float[Tensor, "f P"]:
    """Gain in the probability of each latent's tokens; ids of −1 are none."""
    there_fk = (picked_fk >= 0).float()
    ids_fPk = picked_fk.clamp(min=0)[:, None].expand(-1, after_fPV.shape[1], -1)
    gain_fPk = after_fPV.gather(-1, ids_fPk) - before_PV.expand_as(after_fPV).gather(-1, ids_fPk)
    return (gain_fPk * there_fk[:, None]).sum(-1)


def read_scores(index: FeatureIndex) -> Scores | None:
    """The scores beside an index; None where there are none, or of another index than this."""
    path = scores_path(index)
    if not path.exists():
        return None
    with h5py.File(path) as file:
        columns: Any = file
        if columns.attrs.get("version") != _VERSION or json.loads(columns.attrs["identity"]) != index.identity:
            return None
        return Scores(*(columns[name][:] for name in Scores._fields))
