"""Dose-response: what a latent's direction does to the model's text as its strength grows, beside a random direction's.

Legend: P prompts, L positions, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saebench.index import FeatureIndex
from saebench.labels import syntax
from saebench.models import LanguageModel, next_logits
from saebench.runlog import progress
from saebench.steer.generate import UNSTEERED, Sampling, Text, generate
from saebench.steer.interventions import Intervention, steered, units_of
from saebench.store import Store

STRENGTHS = ("0.1n", "0.2n", "0.35n", "0.5n", "0.75n", "1n", "1.5n")
FACTORS = ("0", "2", "4", "8", "16")
"""the same for `scale`"""
TOP_TOKENS = 10
"""how many of the latent's top logit tokens stand for it"""
_ROWS = 256  # rows of a batch of generation


@dataclass(frozen=True, kw_only=True)
class DoseConfig:
    """What a dose-response measures on."""

    strengths: tuple[str, ...] = STRENGTHS
    """12 (raw; the factor of `scale`), 6x (times the latent's maximum) or 0.5n (of the median norm)"""
    prompts: int = 8
    """beginnings of held-out contexts that are continued"""
    prompt_tokens: int = 16
    """of each prompt, BOS included"""
    n_samples: int = 4
    """texts of each prompt at each strength"""
    max_new_tokens: int = 24
    """of each text"""
    held_out: int = 8
    """held-out contexts on which the change of the next-token distribution is measured"""
    held_out_tokens: int = 64
    """of each, BOS included"""
    seed: int = 0
    """of the choice of prompts, of the noise and of the random direction"""


class Dose(NamedTuple):
    """One strength of one arm."""

    arm: str
    """`unsteered`, `steered` or `random`"""
    strength: float
    """raw"""
    norm: float | None
    """the same as a share of the median norm, where known"""
    logits: float
    """change of the mean logit of the latent's top tokens, less that of all tokens, on held-out text"""
    kl: float
    """KL(clean ‖ steered) per token on held-out text, nats"""
    cross_entropy: float
    """of the generated text under the clean model, nats per token"""
    repetition: float
    """share of the generated 4-grams that came before in the same text"""
    top_tokens: float
    """share of texts that hold one of the latent's top tokens"""
    rule: float | None
    """share of texts in which the latent's rule holds at a generated token; None where it has none"""
    errors: float
    """share of the texts that lies in syntax errors where they are read as Python; prompts begin anywhere, so compare with unsteered"""
    concept: float
    """by how much `rule` (or else `top_tokens`) exceeds its share without steering; 0 where it does not"""
    fluency: float
    """e to the minus rise in cross-entropy, at most 1"""

    @property
    def score(self) -> float:
        """Harmonic mean of concept and fluency."""
        return 2 * self.concept * self.fluency / (self.concept + self.fluency) if self.concept > 0 else 0.0


class DoseResponse(NamedTuple):
    """What `dose_response` returns."""

    latent: int
    mode: str
    doses: list[Dose]
    samples: dict[str, str]
    """a text of the first prompt: unsteered, and steered at the best strength"""

    @property
    def best(self) -> Dose:
        """The steered dose of the highest score; of equal ones the weakest."""
        return max((dose for dose in self.doses if dose.arm == "steered"), key=lambda dose: dose.score)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        doses = [{**dose._asdict(), "score": dose.score} for dose in self.doses]
        return {**self._asdict(), "doses": doses, "best": self.best.strength}


def dose_response(
    model: LanguageModel,
    intervention: Intervention,
    index: FeatureIndex,
    config: DoseConfig = DoseConfig(),
    *,
    prompts: Sequence[Int[np.ndarray, " _"]] | None = None,
    shown: bool = False,
) -> DoseResponse:
    """Steer with an intervention at each of `config.strengths`, and with a random direction, and measure.

    Prompts are beginnings of held-out contexts of the index's store unless given; progress is `shown` on request. Raises ValueError
    for `ablate`, which has no strength, a strength that cannot be read, an index without logits, and as `generate` does.
    """
    if intervention.mode == "ablate":
        raise ValueError("ablate has no strength to vary; choose add, clamp, scale or orthogonal")
    units = units_of(intervention.sae, intervention.latent, index)
    top = top_tokens(index)[intervention.latent]
    if prompts is None:
        prompts = held_out(index.store, config.prompts, config.prompt_tokens, config.seed)
    contexts = held_out(index.store, config.held_out, min(config.held_out_tokens, index.context), config.seed)
    ids = torch.tensor(np.stack(contexts), device=model.device).long()
    arms: dict[tuple[str, float], list[Intervention]] = {(UNSTEERED, 0.0): []}
    for strength in sorted((units.raw(text, intervention.mode) for text in config.strengths), key=abs):
        one = dataclasses.replace(intervention, strength=strength)
        arms["steered", strength] = [one]
        arms["random", strength] = [dataclasses.replace(one, random=config.seed)]
    doses: list[Dose] = []
    with progress(2 * len(arms) - 1, f"sweep latent {intervention.latent}", "dose", shown=shown) as bar:
        texts = _generate(model, arms, prompts, config, bar.update)
        clean = _logits(model, [], ids)
        for (arm, strength), interventions in arms.items():
            changed = _change(model, interventions, ids, clean, top)
            written = _written(index, intervention.latent, top, prompts, texts[arm, strength])
            base = doses[0] if doses else None
            norm = None if intervention.mode == "scale" else units.all(strength)["norm"]
            doses.append(_dose(arm, strength, norm, changed, written, base))
            bar.update()
    best = DoseResponse(intervention.latent, intervention.mode, doses, {}).best
    samples = {UNSTEERED: texts[UNSTEERED, 0.0][0].text, "steered": texts["steered", best.strength][0].text}
    return DoseResponse(intervention.latent, intervention.mode, doses, samples)


def _dose(
    arm: str,
    strength: float,
    norm: float | None,
    changed: tuple[float, float],
    written: dict[str, Any],
    base: Dose | None,
) -> Dose:
    now = written["top_tokens"] if written["rule"] is None else written["rule"]
    concept, fluency = 0.0, 1.0
    if base is not None:
        before = base.top_tokens if base.rule is None else base.rule
        concept = max(0.0, now - before)
        fluency = math.exp(min(0.0, base.cross_entropy - written["cross_entropy"]))
    return Dose(arm, strength, norm, changed[0], changed[1], **written, concept=concept, fluency=fluency)


def _generate(
    model: LanguageModel,
    arms: dict[tuple[str, float], list[Intervention]],
    prompts: Sequence[Int[np.ndarray, " _"]],
    config: DoseConfig,
    done: Callable[[int], Any],
) -> dict[tuple[str, float], list[Text]]:
    """The texts of every arm, as many arms in a batch as fit; `done` is told how many more there are."""
    sampling = Sampling(max_new_tokens=config.max_new_tokens, n_samples=config.n_samples, seed=config.seed)
    names = {f"{arm} {strength}": (arm, strength) for arm, strength in arms}
    size = max(1, _ROWS // (len(prompts) * config.n_samples) - 1)  # and the unsteered one, which comes with each batch
    found: dict[tuple[str, float], list[Text]] = {}
    rest = list(names)[1:]
    for start in range(0, len(rest), size):
        part = {name: arms[names[name]] for name in rest[start : start + size]}
        made = generate(model, prompts, part, sampling, measure="clean")
        found[UNSTEERED, 0.0] = made.of(UNSTEERED)
        found |= {names[name]: made.of(name) for name in part}
        done(len(part))
    return found


def _written(
    index: FeatureIndex, latent: int, top: Int[np.ndarray, " k"], prompts: Sequence[np.ndarray], texts: list[Text]
) -> dict[str, Any]:
    """What can be said of generated texts, by the names of `Dose`."""
    whole = [np.concatenate([prompts[text.prompt], text.tokens]) for text in texts]
    read = ["".join(index.running(tokens[1:])) for tokens in whole]
    held = index.holds(latent, whole)
    rule = None
    if held is not None:
        new = [mask[len(prompts[text.prompt]) :] for mask, text in zip(held, texts, strict=True)]
        rule = float(np.mean([mask.any() for mask in new]))
    surprise = np.concatenate([text.clean_logp for text in texts])
    return {
        "cross_entropy": -float(surprise.mean()),
        "repetition": float(np.mean([repetition(text.tokens) for text in texts])),
        "top_tokens": float(np.mean([np.isin(text.tokens, top).any() for text in texts])),
        "rule": rule,
        "errors": float(np.mean([syntax.share_in_errors(text.encode()) for text in read])),
    }


def repetition(tokens: Int[np.ndarray, " T"], n: int = 4) -> float:
    """Share of a text's n-grams that came before in it; 0 where it is shorter than n."""
    grams = [tuple(tokens[start : start + n].tolist()) for start in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _logits(model: LanguageModel, interventions: Sequence[Intervention], ids: Tensor) -> Float[Tensor, "B L V"]:
    with steered(model, interventions):
        return next_logits(model, ids, keep=ids.shape[1], use_cache=False)[0].float()


def _change(
    model: LanguageModel,
    interventions: Sequence[Intervention],
    ids: Tensor,
    clean: Float[Tensor, "B L V"],
    top: np.ndarray,
) -> tuple[float, float]:
    """(change of the top tokens' mean logit less that of all, mean KL(clean ‖ steered)) on held-out contexts."""
    if not interventions:
        return 0.0, 0.0
    own = _logits(model, interventions, ids)
    change = own - clean
    concept = change[..., torch.as_tensor(top, device=change.device)].mean() - change.mean()
    clean = clean.log_softmax(-1)
    return float(concept), float((clean.exp() * (clean - own.log_softmax(-1))).sum(-1).mean())


def top_tokens(index: FeatureIndex) -> Int[np.ndarray, "F k"]:
    """The tokens whose logits each latent raises most. Raises ValueError for an index without them."""
    found = index.top_logits
    if found is None:
        raise ValueError(f"{index.path} has no logit effects; run `saebench index` again without --no-logits")
    return found[:, :TOP_TOKENS]


def held_out(store: Store, count: int, length: int, seed: int) -> list[Int[np.ndarray, " L"]]:
    """Beginnings of `count` validation contexts, BOS first, chosen by a seed; one choice with a greater count begins the same.

    Raises ValueError when the store has fewer, or its contexts are shorter.
    """
    shards = store.of_split("validation")
    there = [(shard, start) for shard in shards for start in range(0, shard.n_rows, store.context)]
    if count > len(there) or length > store.context:
        raise ValueError(
            f"{count} held-out prompts of {length} tokens were asked for; {store.folder} has {len(there)} contexts of {store.context}"
        )
    order = np.random.default_rng(seed).permutation(len(there))[:count]
    return [there[pick][0].column("tokens", there[pick][1], there[pick][1] + length) for pick in order.tolist()]
