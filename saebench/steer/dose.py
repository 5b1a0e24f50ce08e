"""Dose-response: what a latent's direction does to the model's text as its strength grows, beside two controls.

Legend: P prompts, B choices of prompts, L positions, V vocabulary, H held-out contexts.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saebench.index import FeatureIndex
from saebench.models import LanguageModel, next_logits
from saebench.runlog import progress
from saebench.sae import SAE
from saebench.steer.editor import steered
from saebench.steer.generate import UNSTEERED, Sampling, Text, generate
from saebench.steer.interventions import Intervention
from saebench.steer.reading import Reading, figures, read
from saebench.steer.units import units_of
from saebench.store import Shard, Store

STRENGTHS = ("0.1n", "0.2n", "0.35n", "0.5n", "0.75n", "1n", "1.5n")
FACTORS = ("0", "2", "4", "8", "16")
"""the same for `scale`"""
TOP_TOKENS = 10
"""how many of the latent's top logit tokens stand for it"""
RESAMPLES = 1000
"""bootstrap samples of prompts behind each interval"""
CONTROLS = ("random", "other")
_ROWS = 256  # rows of a batch of generation
_NEAR, _APART = 20, 0.3  # latents of like density among which a control is drawn, and the cosine below which one may be


@dataclass(frozen=True, kw_only=True)
class DoseConfig:
    """What a dose-response measures on."""

    strengths: tuple[str, ...] = STRENGTHS
    """12 (raw; the factor of `scale`), 6x (times the latent's maximum) or 0.5n (of the median norm)"""
    prompts: int = 20
    """beginnings of held-out contexts that are continued; of a store with fewer contexts all"""
    prompt_tokens: int = 16
    """of each prompt, BOS included"""
    n_samples: int = 1
    """texts of each prompt at each strength; more prompts say more than more texts of each"""
    max_new_tokens: int = 24
    """of each text"""
    held_out: int = 8
    """held-out contexts on which the change of the next-token distribution is measured"""
    held_out_tokens: int = 48
    """of each, BOS included"""
    seed: int = 0
    """of the choice of prompts, of the noise, of the controls and of the bootstrap"""


class Dose(NamedTuple):
    """One strength of one arm. `concept`, `fluency` and `score` are defined in `saebench.steer.reading.figures`."""

    arm: str
    """`unsteered`, `steered`, or a control: `random` or `other`, the direction of another latent"""
    strength: float
    """raw"""
    norm: float | None
    """the same as a share of the median norm, where known"""
    concept: float
    """0 to 1: how surely the texts can be told from unsteered ones by how much the latent fires when the clean model reads them"""
    fluency: float
    """0 to 1: how near they are to unsteered ones in surprise, too high or too low, and in what they repeat"""
    score: float
    """harmonic mean of concept and fluency"""
    firing: float
    """share of generated tokens on which the latent fires above its median firing, read by the clean model"""
    activation: float
    """its mean activation on them"""
    rule: float | None
    """share of texts in which the latent's rule holds at a generated token, labelled as the index labels; None where it has none"""
    top_tokens: float
    """share of texts that hold one of the latent's top tokens"""
    cross_entropy: float
    """of the generated text under the clean model, nats per token"""
    diversity: float
    """share of the generated n-grams that are distinct in their text, n = 2, 3, 4, multiplied"""
    errors: float
    """share of the texts that lies in syntax errors where they are read as Python; prompts begin anywhere, so compare with unsteered"""
    logits: float
    """change of the mean logit of the latent's top tokens, less that of all tokens, on held-out text"""
    kl: float
    """KL(clean ‖ steered) per token on held-out text, nats"""
    intervals: dict[str, tuple[float, float]]
    """95% of each of these but strength and norm: percentiles of a bootstrap over prompts (`logits`, `kl`: over contexts)"""

    def told(self) -> list[str]:
        """concept, fluency and score in words, with their intervals."""
        return [
            f"{getattr(self, name):.2f} ({self.intervals[name][0]:.2f} to {self.intervals[name][1]:.2f})"
            for name in ("concept", "fluency", "score")
        ]


class DoseResponse(NamedTuple):
    """What `dose_response` returns."""

    latent: int
    mode: str
    other: int | None
    """the latent whose direction is the control `other`; None where there is none far enough from this one's"""
    doses: list[Dose]
    """on all prompts"""
    tested: list[Dose]
    """the best strength, steered and each control, on the half of the prompts that did not choose it"""
    samples: dict[str, str]
    """a text of the first prompt that did not choose: unsteered, and steered at the best strength"""

    @property
    def best(self) -> Dose:
        """The steered dose whose score is highest on one half of the prompts (of equal ones the weakest), measured on the other."""
        return self.tested[0]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values; `best` is its strength."""
        doses, tested = ([dose._asdict() for dose in some] for some in (self.doses, self.tested))
        return {**self._asdict(), "doses": doses, "tested": tested, "best": self.best.strength}


def dose_response(
    model: LanguageModel,
    intervention: Intervention,
    index: FeatureIndex,
    config: DoseConfig = DoseConfig(),
    *,
    prompts: Sequence[Int[np.ndarray, " _"]] | None = None,
    shown: bool = False,
) -> DoseResponse:
    """Steer with an intervention at each of `config.strengths`, and with both controls at the same norm, and measure.

    The controls are a random direction, and the direction of another latent that fires about as often (`control_of`). The best strength is chosen on every
    second prompt, and what it does told by the others. Prompts are beginnings of held-out contexts of the index's store
    unless given; progress is `shown` on request. Raises ValueError for `ablate`, which has no strength, a latent that never
    fired in the index, fewer than two prompts, a strength that cannot be read, an index without logits, and as `generate` does.
    """
    latent = intervention.latent
    if intervention.mode == "ablate":
        raise ValueError("ablate has no strength to vary; choose add, clamp, scale or orthogonal")
    if not index.columns["fires"][latent]:
        raise ValueError(
            f"latent {latent} never fired in {index.path}: there is no firing of its own to compare with; choose one that did"
        )
    units = units_of(intervention.sae, latent, index)
    top = top_tokens(index)[latent]
    if prompts is None:
        prompts = held_out(
            index.store, min(config.prompts, len(_contexts(index.store))), config.prompt_tokens, config.seed
        )
    if len(prompts) < 2:
        raise ValueError(
            f"there is {len(prompts)} prompt; expected at least 2: one half chooses the best strength and the other tests it"
        )
    contexts = held_out(index.store, config.held_out, min(config.held_out_tokens, index.context), config.seed)
    ids = torch.tensor(np.stack(contexts), device=model.device).long()
    arms: dict[tuple[str, float], list[Intervention]] = {(UNSTEERED, 0.0): []}
    other = control_of(index, intervention.sae, latent, config.seed)
    for strength in sorted((units.raw(text, intervention.mode) for text in config.strengths), key=abs):
        one = dataclasses.replace(intervention, strength=strength)
        arms["steered", strength] = [one]
        arms["random", strength] = [dataclasses.replace(one, random=config.seed)]
        if other is not None:
            arms["other", strength] = [dataclasses.replace(one, instead=other)]
    with progress(2 * len(arms) - 1, f"sweep latent {latent}", "dose", shown=shown) as bar:
        texts = _generate(model, arms, prompts, config, bar.update)
        clean = _logits(model, [], ids)
        readings: dict[tuple[str, float], Reading] = {}
        changes: dict[tuple[str, float], dict[str, np.ndarray]] = {}
        for arm, interventions in arms.items():
            changes[arm] = _change(model, interventions, ids, clean, top)
            readings[arm] = read(model, intervention.sae, index, latent, top, prompts, texts[arm])
            bar.update()

    def doses(some: Sequence[tuple[str, float]], places: range) -> list[Dose]:
        found = []
        for arm, strength in some:
            norm = None if intervention.mode == "scale" else units.all(strength)["norm"]
            told = _dose(readings[arm, strength], readings[UNSTEERED, 0.0], changes[arm, strength], places, config.seed)
            found.append(Dose(arm, strength, norm, **told))
        return found

    choosing, testing = range(0, len(prompts), 2), range(1, len(prompts), 2)
    chosen = doses([arm for arm in arms if arm[0] == "steered"], choosing)
    best = max(chosen, key=lambda dose: dose.score).strength
    tested = doses([(arm, best) for arm in ("steered", *CONTROLS) if (arm, best) in arms], testing)
    place = config.n_samples  # the first text of the second prompt
    samples = {arm[0]: texts[arm][place].text for arm in ((UNSTEERED, 0.0), ("steered", best))}
    return DoseResponse(latent, intervention.mode, other, doses(list(arms), range(len(prompts))), tested, samples)


def _dose(
    texts: Reading, unsteered: Reading, change: Mapping[str, Float[np.ndarray, " H"]], places: range, seed: int
) -> dict[str, Any]:
    """Figures of an arm on the prompts at `places`, and their intervals, by the names of `Dose`."""
    generator = np.random.default_rng(seed)
    drawn = np.array(places)[generator.integers(len(places), size=(RESAMPLES, len(places)))]
    n_contexts = len(change["kl"])
    contexts = generator.integers(n_contexts, size=(RESAMPLES, n_contexts))
    point = dict(figures(texts, unsteered, np.array(places)[None]))
    spread = dict(figures(texts, unsteered, drawn))
    for name, values_H in change.items():
        point[name], spread[name] = values_H.mean(keepdims=True), values_H[contexts].mean(1)
    told = {name: None if value is None else float(value[0]) for name, value in point.items()}
    ends: dict[str, tuple[float, float]] = {}
    for name, values in spread.items():
        if values is not None and (value := told[name]) is not None:
            low, high = np.percentile(values, [2.5, 97.5]).tolist()
            ends[name] = (
                min(low, value),
                max(high, value),
            )  # a distance between samples only grows where they are drawn again
    return {**told, "intervals": ends}


def control_of(index: FeatureIndex, sae: SAE, latent: int, seed: int) -> int | None:
    """Another latent to compare with: drawn by the seed from those nearest in density whose direction is another.

    Directions count as others at an absolute cosine below 0.3; None where no latent that fires has one.
    """
    rows_FD = sae.W_dec.detach().float()
    cosines = torch.nn.functional.cosine_similarity(rows_FD, rows_FD[latent, None]).abs().cpu().numpy()
    density = index.columns["density"]
    there = np.flatnonzero((density > 0) & (cosines < _APART))
    distance = np.abs(np.log(density[there] / density[latent]))
    near = there[np.argsort(distance, kind="stable")][:_NEAR]
    return int(np.random.default_rng([seed, latent]).choice(near)) if len(near) else None


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
        made = generate(model, prompts, part, sampling, measure="none")
        found[UNSTEERED, 0.0] = made.of(UNSTEERED)
        found |= {names[name]: made.of(name) for name in part}
        done(len(part))
    return found


def _logits(model: LanguageModel, interventions: Sequence[Intervention], ids: Tensor) -> Float[Tensor, "H L V"]:
    with steered(model, interventions, tokens=ids):
        return next_logits(model, ids, keep=ids.shape[1], use_cache=False)[0].float()


def _change(
    model: LanguageModel,
    interventions: Sequence[Intervention],
    ids: Tensor,
    clean: Float[Tensor, "H L V"],
    top: np.ndarray,
) -> dict[str, Float[np.ndarray, " H"]]:
    """`logits` (change of the top tokens' mean logit less that of all) and `kl` (clean ‖ steered) of each held-out context."""
    if not interventions:
        return {"logits": np.zeros(len(ids)), "kl": np.zeros(len(ids))}
    own = _logits(model, interventions, ids)
    change = own - clean
    logits = change[..., torch.as_tensor(top, device=change.device)].mean((1, 2)) - change.mean((1, 2))
    clean = clean.log_softmax(-1)
    kl = (clean.exp() * (clean - own.log_softmax(-1))).sum(-1).mean(1)
    return {"logits": logits.double().cpu().numpy(), "kl": kl.double().cpu().numpy()}


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
    there = _contexts(store)
    if count > len(there) or length > store.context:
        raise ValueError(
            f"{count} held-out prompts of {length} tokens were asked for; {store.folder} has {len(there)} contexts of {store.context}"
        )
    order = np.random.default_rng(seed).permutation(len(there))[:count]
    return [there[pick][0].column("tokens", there[pick][1], there[pick][1] + length) for pick in order.tolist()]


def _contexts(store: Store) -> list[tuple[Shard, int]]:
    """(shard, first row) of each validation context."""
    shards = store.of_split("validation")
    return [(shard, start) for shard in shards for start in range(0, shard.n_rows, store.context)]
