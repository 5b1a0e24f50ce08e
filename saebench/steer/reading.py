"""What generated texts say of a latent: they are read by the model as it is, beside the unsteered texts of the same prompts.

Legend: P prompts, S texts of each, B choices of prompts (all of them, a half, or bootstrap samples), L columns, T generated tokens.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saebench.evaluate.attribution import left_alone
from saebench.index import FeatureIndex
from saebench.labels import syntax
from saebench.models import LanguageModel, edits, head, last_states
from saebench.sae import SAE, latent_encoder
from saebench.steer.generate import Text

_LOGITS = 2**26  # held at once


class Reading(NamedTuple):
    """Figures of the texts of one arm, `[P, S]` each, of generated tokens alone."""

    firing: np.ndarray
    """share of the tokens on which the latent fires above the median of its firings in the index"""
    activation: np.ndarray
    """the latent's mean activation on a token, firing or not"""
    cross_entropy: np.ndarray
    """mean surprise, nats per token"""
    diversity: np.ndarray
    """`diversity` of the tokens"""
    top_tokens: np.ndarray
    """whether one of the latent's top logit tokens is there"""
    errors: np.ndarray
    """share of the text that lies in syntax errors where it is read as Python"""
    rule: np.ndarray | None
    """whether the latent's rule holds at a token; None where it has none"""


def read(
    model: LanguageModel,
    sae: SAE,
    index: FeatureIndex,
    latent: int,
    top: Int[np.ndarray, " k"],
    prompts: Sequence[Int[np.ndarray, " _"]],
    texts: Sequence[Text],
) -> Reading:
    """Read the texts of one arm, those of the first prompt first, in one pass without interventions.

    Activations are those at the hooks that the index reads; special tokens and massive vectors are left out of them, as in the index.
    """
    whole = [np.concatenate([prompts[text.prompt], text.tokens]) for text in texts]
    starts = [len(prompts[text.prompt]) for text in texts]
    rule = None
    if (held := index.holds(latent, whole)) is not None:
        rule = [float(mask[start:].any()) for mask, start in zip(held, starts, strict=True)]
    found = {
        **_passed(model, sae, index, latent, whole, starts),
        "diversity": [diversity(text.tokens) for text in texts],
        "top_tokens": [float(np.isin(text.tokens, top).any()) for text in texts],
        "errors": [syntax.share_in_errors("".join(index.running(tokens[1:])).encode()) for tokens in whole],
    }
    columns = {name: np.array(values, float).reshape(len(prompts), -1) for name, values in found.items()}
    return Reading(**columns, rule=None if rule is None else np.array(rule).reshape(len(prompts), -1))


def _passed(
    model: LanguageModel,
    sae: SAE,
    index: FeatureIndex,
    latent: int,
    whole: Sequence[np.ndarray],
    starts: Sequence[int],
) -> dict[str, list[float]]:
    """`firing`, `activation` and `cross_entropy` of each text, whose generated tokens begin at `starts`."""
    ids_RL = torch.zeros(len(whole), max(map(len, whole)), dtype=torch.long)
    new_RL = torch.zeros_like(ids_RL, dtype=torch.bool)
    for row, (tokens, start) in enumerate(
        zip(whole, starts, strict=True)
    ):  # what comes after a text's end changes nothing in it
        ids_RL[row, : len(tokens)] = torch.as_tensor(tokens)
        new_RL[row, start : len(tokens)] = True
    encode, found = latent_encoder(sae, [latent]), {"firing": [], "activation": [], "cross_entropy": []}
    size = max(1, _LOGITS // (ids_RL.shape[1] * model.n_vocab))
    for ids, new in zip(ids_RL.to(model.device).split(size), new_RL.to(model.device).split(size), strict=True):
        x, states = _read(model, ids, index.ends.reads)
        before = new[:, 1:]  # the places whose logits are of a generated token
        log_p_nV = head(model, states[:, :-1][before]).float().log_softmax(-1)
        logp_n = log_p_nV.gather(-1, ids[:, 1:][before][:, None])[:, 0].cpu().numpy()
        counted = new & ~left_alone(model, ids, x, index.longest)
        acts_n = encode(x[counted].to(sae.W_dec.device))[:, 0].float().cpu().numpy()
        above_n = index.quantiles(np.full(len(acts_n), latent), acts_n) > 0.5
        for name, values_n, there in (
            ("firing", above_n, counted), ("activation", acts_n, counted), ("cross_entropy", -logp_n, before),
        ):  # fmt: skip
            found[name] += [_mean(part) for part in np.split(values_n, there.sum(1).cumsum(0)[:-1].tolist())]
    return found


def _read(
    model: LanguageModel, ids: Int[Tensor, "R L"], hooks: Sequence[str]
) -> tuple[Float[Tensor, "R L D"], Float[Tensor, "R L M"]]:
    """(vectors at the hooks, one behind the other, those behind the final norm)."""
    seen: dict[str, Tensor] = {}

    def see(hook: str, value: Tensor) -> None:
        seen[hook] = value.clone()  # later layers may add to it in place

    with edits(model, {hook: partial(see, hook) for hook in hooks})():
        states = last_states(model, ids)
    return torch.cat([seen[hook].float() for hook in hooks], -1), states


def _mean(values: np.ndarray) -> float:
    """0 of none: a text of nothing but its end."""
    return float(values.mean()) if len(values) else 0.0


def diversity(tokens: Int[np.ndarray, " T"]) -> float:
    """Π over n = 2, 3, 4 of the share of a text's n-grams that are distinct (Su et al. 2022); 1 where it repeats nothing."""
    product = 1.0
    for n in (2, 3, 4):
        grams = [tuple(tokens[start : start + n].tolist()) for start in range(len(tokens) - n + 1)]
        product *= len(set(grams)) / len(grams) if grams else 1.0
    return product


def figures(
    texts: Reading, unsteered: Reading, picks_BP: Int[np.ndarray, "B P"]
) -> Mapping[str, Float[np.ndarray, " B"] | None]:
    """An arm's figures over each choice of prompts, beside the unsteered texts of the same.

    concept: how much more often a steered text fires the latent on a greater share of its tokens than an unsteered text of its prompt than on a
    smaller one (Cliff's δ, mean over prompts; 0 where negative). It asks the same of every latent: a rare one and one that
    fires on every second token both reach 1 where each text tells the two apart, whatever their scales. It has no reward for
    a text that fires everywhere over one that fires enough: what that costs is fluency's to say.

    fluency: e^−W · min(1, D / D₀). W is the distance (Wasserstein-1, nats) between the surprise of the arm's texts and that of
    unsteered ones, D and D₀ their mean diversity. Surprise counts by text, not on average: half of the texts garbled and half collapsed have an ordinary mean.

    score: the harmonic mean of the two.
    """
    found = {
        name: None if column is None else column[picks_BP].mean((1, 2)) for name, column in texts._asdict().items()
    }
    more = np.sign(texts.firing[:, :, None] - unsteered.firing[:, None, :]).mean((1, 2))
    concept = np.maximum(more[picks_BP].mean(1), 0)
    surprise, ordinary = (np.sort(one.cross_entropy[picks_BP].reshape(len(picks_BP), -1)) for one in (texts, unsteered))
    ratio = texts.diversity[picks_BP].mean((1, 2)) / np.maximum(unsteered.diversity[picks_BP].mean((1, 2)), 1e-9)
    fluency = np.exp(-np.abs(surprise - ordinary).mean(1)) * np.minimum(ratio, 1)
    score = 2 * concept * fluency / np.maximum(concept + fluency, 1e-9)
    return {**found, "concept": concept, "fluency": fluency, "score": score}
