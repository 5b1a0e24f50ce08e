"""How well each latent of an SAE can be steered with: an input and an output score for all of them.

The two rarely coincide, and only the output score says that turning a latent up brings what it stands for
(Arad et al. 2025, "SAEs Are Good for Steering – If You Select the Right Features").
All latents are screened on short prompts, and the best of them measured whole: the others' scores are estimates, and marked.
Legend: P prompts, L positions, D d_in, F latents, f latents of one batch, V vocabulary.
"""

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from saebench.evaluate.attribution import left_alone, read
from saebench.files import replacing
from saebench.index import FeatureIndex
from saebench.index.names import Names
from saebench.index.schema import open_index
from saebench.models import LanguageModel, clean_pass, depth, edits, head, resumed_states, resumes
from saebench.runlog import interruptible, progress
from saebench.sae import SAE, encode_sparse
from saebench.sae.architectures import normalized
from saebench.steer.dose import held_out, top_tokens

_HELD = 2**25  # numbers held at once, as logits or as vectors of a layer
_VERSION = 2
_SAVE_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """What output scores are measured with."""

    strength: float = 0.5
    """of each latent's vector, as a share of the median norm at the hook written"""
    prompts: int = 8
    """beginnings of held-out contexts"""
    prompt_tokens: int = 12
    """of each, BOS included"""
    seed: int = 0
    """of their choice"""
    screen_tokens: int = 2
    """of each, BOS and the last ones, on which every latent is screened"""
    whole: int = 400
    """latents measured on all prompts, those that the screen puts first"""

    def __post_init__(self) -> None:
        if not 2 <= self.screen_tokens <= self.prompt_tokens:
            raise ValueError(
                f"screen_tokens is {self.screen_tokens}; expected 2 to prompt_tokens = {self.prompt_tokens}"
            )


class Scores(NamedTuple):
    """Figures of all latents."""

    input: np.ndarray
    """`[F]` F1 of what names the latent best on held-out documents; NaN where nothing was scored"""
    output: np.ndarray
    """`[F]` probability that its top 10 logit tokens gain when it is clamped: mean over prompts, of the next token; NaN where not known yet"""
    rising: np.ndarray
    """`[F]` share of the prompts on which they gain"""
    measured: np.ndarray
    """`[F]` bool: on all prompts; the others' figures are estimates of the screen"""
    screen: np.ndarray
    """`[F]` those estimates, by which latents are chosen to be measured; NaN where there are none"""


def scores_path(index: Path) -> Path:
    """`<sae>.scores.h5` beside the index."""
    return index.with_suffix(".scores.h5")


def score(
    model: LanguageModel,
    sae: SAE,
    index: FeatureIndex,
    config: ScoreConfig = ScoreConfig(),
    *,
    among: Int[np.ndarray, " n"] | None = None,
) -> Scores | None:
    """Score every latent, or some measured whole, and write `scores_path`; None where Ctrl-C ended it early.

    What was scored is kept, and the same call goes on from there; what is complete costs nothing. Raises ValueError for an index without logits, a store with too
    few held-out contexts, and a model whose later layers read more than the residual stream.
    """
    scores = _begun(index, config) or _nothing(index)
    prompts = np.stack(held_out(index.store, config.prompts, config.prompt_tokens, config.seed))
    short = np.concatenate([prompts[:, :1], prompts[:, 1 - config.screen_tokens :]], 1)
    with interruptible() as interrupt:
        for stage, tokens in (("screen", short), ("measure", prompts)):
            whole = stage == "measure"
            if whole:
                best = np.argsort(-scores.screen, kind="stable")[: config.whole] if among is None else among
                todo = best[~scores.measured[best]]
            else:
                todo = np.flatnonzero(np.isnan(scores.screen)) if among is None else among[:0]
            trial, saved = _Trial(model, sae, index, tokens, config, len(todo)) if len(todo) else None, time.monotonic()
            with progress(len(todo), f"{stage} {index.path.stem}", "latent", shown=len(todo) > 0) as bar:
                while len(todo) and trial is not None and not interrupt.requested:
                    latents, todo = todo[: trial.size], todo[trial.size :]
                    _take(scores, latents, trial(latents), whole)
                    bar.update(len(latents))
                    if time.monotonic() - saved > _SAVE_SECONDS:
                        _write(index, config, scores)
                        saved = time.monotonic()
            if trial is not None:
                _write(index, config, scores)
            if interrupt.requested:
                return None
    return scores


def _take(scores: Scores, latents: Int[np.ndarray, " f"], gains_fP: Float[np.ndarray, "f P"], whole: bool) -> None:
    """An estimate does not replace what was measured."""
    if not whole:
        scores.screen[latents] = gains_fP.mean(1)
    better = latents if whole else latents[~scores.measured[latents]]
    gains_fP = gains_fP[np.isin(latents, better)]
    scores.output[better], scores.rising[better] = gains_fP.mean(1), (gains_fP > 0).mean(1)
    scores.measured[better] = whole


class _Trial:
    """Latents clamped on some prompts: passes that begin at the first hook written."""

    def __init__(
        self, model: LanguageModel, sae: SAE, index: FeatureIndex, prompts: Int[np.ndarray, "P L"], config: ScoreConfig,
        most: int,
    ) -> None:  # fmt: skip
        self.model, self.sae = model, sae
        self.size = min(most, max(1, _HELD // max(len(prompts) * model.n_vocab, prompts.size * model.d_model * 4)))
        """latents at once, at most `most`"""
        self._picked = torch.as_tensor(top_tokens(index), device=model.device).long()
        median = index.store.median_norm(index.ends.writes)
        self._raw_F = config.strength * median / sae.W_dec.norm(dim=1)
        tokens = torch.as_tensor(prompts, device=model.device).long()
        self._writes, hook = index.ends.writes, min(index.ends.writes, key=depth)
        if not resumes(model, hook):
            raise ValueError(f"model {model.id!r} cannot be scored: layers after {hook} read more than its output")
        once = clean_pass(model, tokens, hook)
        self._clean = clean_pass(model, repeat(tokens, "p l -> (f p) l", f=self.size), hook)
        self._x_PLD = read(model, tokens, index.ends)[0]
        self._left_alone_PL = left_alone(model, tokens, self._x_PLD, index.longest)
        with torch.no_grad():
            self._scale = normalized(self._x_PLD, sae.normalize)[1]
            self._before_PV = head(model, once.states[:, -1]).float().softmax(-1)
            self._code, self._values = encode_sparse(sae, rearrange(self._x_PLD, "p l d -> (p l) d"))

    @torch.no_grad()
    def __call__(self, latents: Int[np.ndarray, " f"]) -> Float[np.ndarray, "f P"]:
        """Gain in the probability of each latent's tokens on each prompt."""
        picked_f = torch.as_tensor(latents, device=self.model.device)
        n = len(picked_f)
        acts_fR = torch.stack([self._of(latent) for latent in picked_f])
        acts_fPL = rearrange(acts_fR, "f (p l) -> f p l", p=len(self._x_PLD))
        change_fPL = self._raw_F[picked_f, None, None] - acts_fPL
        change_fPL[:, self._left_alone_PL] = 0
        change = (change_fPL[..., None] * self._scale) * self.sae.W_dec[picked_f, None, None]
        parts = rearrange(change, "f p l e -> (f p) l e").chunk(len(self._writes), -1)
        changes = dict(zip(self._writes, parts, strict=True))
        clean = self._clean
        if n < self.size:  # the last of them
            clean = clean_pass(self.model, self._clean.tokens[: n * len(self._x_PLD)], self._clean.hook)

        def changed(hook: str, value: Tensor) -> Tensor:
            return (value.float() + changes[hook]).to(value.dtype)

        first = changed(clean.hook, clean.value)
        with edits(self.model, {hook: partial(changed, hook) for hook in changes if hook != clean.hook})():
            states = resumed_states(self.model, clean, first)[:, -1]
        after_fPV = rearrange(head(self.model, states).float().softmax(-1), "(f p) v -> f p v", f=n)
        return _gain(after_fPV, self._before_PV, self._picked[picked_f]).cpu().numpy()

    def _of(self, latent: Tensor) -> Float[Tensor, " R"]:
        """A latent's activation at each position of the prompts."""
        mine = self._code.latents == latent
        acts_R = self._x_PLD.new_zeros(self._code.n_rows)
        acts_R[self._code.rows[mine].long()] = self._values[mine]
        return acts_R


def _gain(
    after_fPV: Float[Tensor, "f P V"], before_PV: Float[Tensor, "P V"], picked_fk: Tensor
) -> Float[Tensor, "f P"]:
    """Gain in the probability of each latent's tokens; ids of −1 are none."""
    there_fk = (picked_fk >= 0).float()
    ids_fPk = picked_fk.clamp(min=0)[:, None].expand(-1, after_fPV.shape[1], -1)
    gain_fPk = after_fPV.gather(-1, ids_fPk) - before_PV.expand_as(after_fPV).gather(-1, ids_fPk)
    return (gain_fPk * there_fk[:, None]).sum(-1)


def _nothing(index: FeatureIndex) -> Scores:
    output, rising, screen = (np.full(index.d_sae, np.nan, np.float32) for _ in range(3))
    return Scores(
        Names(index).columns["name_f1"].astype(np.float32), output, rising, np.zeros(index.d_sae, bool), screen
    )


def _write(index: FeatureIndex, config: ScoreConfig, scores: Scores) -> None:
    best = np.argsort(-scores.screen, kind="stable")[: config.whole]
    complete = bool(scores.measured[best].all() and not np.isnan(scores.screen).any())
    with replacing(scores_path(index.path)) as temporary, h5py.File(temporary, "w") as file:
        file.attrs.update(version=_VERSION, complete=complete, identity=json.dumps(index.identity), **vars(config))
        for name, values in scores._asdict().items():
            file[name] = values


def _begun(index: FeatureIndex, config: ScoreConfig) -> Scores | None:
    """What an earlier call with the same settings left."""
    path = scores_path(index.path)
    if not path.exists():
        return None
    with h5py.File(path) as file:
        attributes: Any = file.attrs
        if any(attributes.get(name) != value for name, value in vars(config).items()):
            return None
    return read_scores(index)


def are_complete(index: Path) -> bool:
    """Whether an index has scores beside it that are its own, and no latent is left to be screened or measured."""
    path = scores_path(index)
    if not path.exists():
        return False
    with h5py.File(path) as file, open_index(index) as own:
        attributes: Any = file.attrs
        if json.loads(attributes["identity"]) != json.loads(own.attrs["identity"]):
            return False
        return bool(file.attrs.get("complete", True))  # those of the first version were written when they were


def read_scores(index: FeatureIndex) -> Scores | None:
    """The scores beside an index; None where there are none, of another index than this, or of edits to massive rows."""
    path = scores_path(index.path)
    if not path.exists():
        return None
    with h5py.File(path) as file:
        columns: Any = file
        version = columns.attrs.get("version")
        if version not in (1, _VERSION) or json.loads(columns.attrs["identity"]) != index.identity:
            return None
        known = {name: columns[name][:] for name in Scores._fields if name in columns}
    if version == 1 and index.has_store and any(index.store.norms(hook).massive for hook in index.ends.reads):
        return None
    known["input"] = _nothing(index).input  # the index may have been made anew with other rules
    if version == 1:  # measured all
        known |= {"measured": np.ones(len(known["output"]), bool), "screen": np.full_like(known["output"], np.nan)}
    return Scores(**known)
