"""Steering from the command line: what belongs together is opened, and one thing done with it."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saebench.config import Count
from saebench.files import read_json, write_json, writing
from saebench.index import FeatureIndex
from saebench.index.schema import check_identity
from saebench.sae.hub import SaePath
from saebench.steer.bench import Bench, open_bench
from saebench.steer.dose import FACTORS, STRENGTHS, DoseConfig, DoseResponse, dose_response
from saebench.steer.generate import Generation, Sampling, arms_of, generate
from saebench.steer.interventions import Intervention, Mode, Positions
from saebench.steer.scores import Scores, read_scores, score, scores_path
from saebench.steer.turns import Turn, interventions, parse_turns
from saebench.view import charts

_SWEEP_VERSION = (
    2  # of a sweep's file; the first had neither intervals nor a version, and its concept was the rule's share
)


@dataclass(frozen=True, kw_only=True)
class SteerConfig:
    """Which latents to steer with, how far, and what to write."""

    sae: SaePath
    """SAE, made here or in any format that others release: its folder or file, hf:OWNER/REPO[@REVISION][/FOLDER] or a release by SAELens' name"""
    hook: str | None = None
    """hook that it reads, where neither its files nor an index say"""
    model: str | None = None
    """model that it is of, where neither its files nor an index say"""
    latent: tuple[Count, ...] = ()
    """numbers of latents, steered with together (for `rank`: among which; default: all)"""
    strength: tuple[str, ...] = ("0.5n",)
    """one for all or one for each latent: 12 (raw), 6x (times its maximum in the index) or 0.5n (of the median norm)"""
    mode: Mode = "add"
    """add: x + c d; clamp: the latent set to c; scale: the latent times c; ablate: set to 0; orthogonal: x's part along d replaced by c d"""
    positions: Positions = "all"
    """where; BOS is left alone, and `generated` begins with the first generated token's own vector"""
    turns: str = ""
    """instead of latent, strength and mode: 12:add:0.5n,7@SAE:ablate, as the app writes it; @ names another SAE in the same folder"""
    massive: bool = False
    """edit massive vectors too: attention sinks that are not BOS"""
    prompt: str = ""
    """text to continue"""
    n: Count = 3
    """texts in each arm"""
    max_new_tokens: Count = 48
    """tokens of each"""
    temperature: float = 1.0
    """0 takes the most likely token"""
    top_p: float = 1.0
    """draw from the fewest tokens whose probabilities reach this sum"""
    repetition_penalty: float = 1.0
    """above 1 makes tokens already in the text less likely"""
    seed: int = 0
    """of the noise, the same in every arm"""
    controls: bool = True
    """also a random direction of the same norm, and the negative strength"""
    sweep: bool = False
    """the dose-response of one latent instead: from weak to strong, beside a random direction and another latent's"""
    out: Path | None = None
    """file for the results as JSON; of --sweep also a figure beside it (.html)"""
    top: Count = 20
    """how many latents `rank` lists"""
    index: Path | None = None
    """index file (default: index/NAME.h5 beside the folder saes/ that holds the SAE)"""
    store: Path | None = None
    """activation store (default: the one that was indexed)"""
    device: str | None = None
    """cuda, mps or cpu (default: the first at hand)"""

    def __post_init__(self) -> None:
        if self.turns and (self.latent or self.strength != ("0.5n",) or self.mode != "add"):
            raise ValueError("turns say latents, strengths and modes; leave out --latent, --strength and --mode")
        parse_turns(self.turns)
        if not self.sweep and len(self.strength) not in (1, len(self.latent)):
            raise ValueError(
                f"{len(self.strength)} strengths for {len(self.latent)} latents; give one for all or one for each"
            )

    def open(self) -> Bench:
        return open_bench(
            self.sae, index=self.index, store=self.store, device=self.device, hook=self.hook, model=self.model
        )


def steer(config: SteerConfig) -> Generation:
    """Continue the prompt with and without steering, and under the controls. Writes `config.out`, where it is named.

    Raises ValueError without a latent, and as `open_bench`, `Units.raw` and `generate` do.
    """
    turns = parse_turns(config.turns)
    if not turns:
        _some(config)
        strengths = config.strength * (len(config.latent) if len(config.strength) == 1 else 1)
        pairs = zip(config.latent, strengths, strict=True)
        turns = tuple(Turn(latent=latent, mode=config.mode, strength=strength) for latent, strength in pairs)
    bench = config.open()
    wanted = interventions(bench, turns, config.positions)
    if config.massive:
        wanted = [dataclasses.replace(one, longest=math.inf) for one in wanted]
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens, n_samples=config.n, seed=config.seed, temperature=config.temperature,
        top_p=config.top_p, repetition_penalty=config.repetition_penalty,
    )  # fmt: skip
    arms = arms_of(wanted, controls=config.controls, seed=config.seed)
    made = generate(bench.model, config.prompt, arms, sampling)
    if config.out is not None:
        texts = [
            {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in text._asdict().items()}
            for text in made.texts
        ]
        write_json(config.out, {"prompt": made.prompts[0], "texts": texts, "seconds": made.seconds})
    return made


def sweep(config: SteerConfig) -> DoseResponse:
    """The dose-response of one latent; of a prompt of one's own as many texts as of others. Writes `config.out` and a figure beside it, where it is named.

    Raises ValueError for any number of latents but one, an SAE without an index, and as `dose_response` does.
    """
    _some(config)
    bench, latent = config.open(), max(config.latent)
    if len(config.latent) > 1 or bench.index is None:
        raise ValueError("--sweep is of one latent of an indexed SAE; run `saebench index` first, or name one latent")
    start = Intervention(
        sae=bench.sae,
        ends=bench.ends,
        latent=latent,
        mode=config.mode,
        positions=config.positions,
        longest=bench.longest,
    )
    start = dataclasses.replace(start, longest=math.inf) if config.massive else start
    usual = FACTORS if config.mode == "scale" else STRENGTHS
    strengths = usual if config.strength == ("0.5n",) else config.strength
    doses = DoseConfig(strengths=strengths, seed=config.seed, max_new_tokens=config.max_new_tokens)
    prompts = [np.array(bench.model.tokens_of(config.prompt))] * doses.prompts if config.prompt else None
    found = dose_response(bench.model, start, bench.index, doses, prompts=prompts, shown=True)
    if config.out is not None:
        told = {name: getattr(config, name) for name in ("positions", "massive", "seed", "prompt", "max_new_tokens")}
        with writing(config.out):
            write_json(config.out, {"version": _SWEEP_VERSION, "of": bench.index.belonging, **told, **found.to_json()})
            charts.dose_response(found.to_json()).write_html(config.out.with_suffix(".html"), include_plotlyjs=True)
    return found


def read_sweep(path: Path, index: FeatureIndex, latent: int, mode: Mode, positions: str) -> dict[str, Any]:
    """What `sweep` wrote.

    Raises ValueError where it is of another version, SAE, index, latent, mode or positions than these, and for a file that is no sweep.
    """
    found: Any = read_json(path)
    if not isinstance(found, dict) or not {"latent", "mode", "doses"} <= set(found):
        raise ValueError(f"{path} is no dose-response: measure again")
    if (version := found.get("version", 1)) != _SWEEP_VERSION:
        raise ValueError(
            f"{path} is a dose-response of version {version!r}, this saebench reads {_SWEEP_VERSION}: "
            "concept and fluency were other figures then, without intervals; measure again"
        )
    for name, value in {"latent": latent, "mode": mode, "positions": positions}.items():
        if found.get(name) != value:
            raise ValueError(f"{path} was measured with {name} {found.get(name)!r}; expected {value!r}: measure again")
    if not isinstance(found.get("of"), dict):
        raise ValueError(f"{path} does not say of which SAE and index it is: measure again")
    check_identity(path, found["of"], index.belonging, "measure again")
    return found


def rank(config: SteerConfig) -> tuple[Bench, Scores, np.ndarray]:
    """(what was opened, scores, the latents of highest output score first).

    Scores are measured once and kept beside the index; latents that are named are measured whole. Ctrl-C ends it with
    KeyboardInterrupt, once what was scored is kept. Raises ValueError for an SAE without an index, and as `score` does.
    """
    if config.turns:
        raise ValueError("rank turns nothing; choose among latents with --latent N, not --turns")
    bench = config.open()
    if bench.index is None:
        raise ValueError(f"{config.sae} has no index; run `saebench index --sae {config.sae}` first")
    if wrong := [latent for latent in config.latent if latent >= bench.sae.d_sae]:
        raise ValueError(f"latent is {wrong[0]}; the SAE has 0 to {bench.sae.d_sae - 1}")
    among = np.array(config.latent or range(bench.sae.d_sae))
    with writing(scores_path(bench.index.path)):
        scores = read_scores(bench.index)
        if scores is None or not scores.measured[among].all():
            scores = score(bench.model, bench.sae, bench.index, among=among if config.latent else None)
            if scores is None:
                raise KeyboardInterrupt
    best = np.lexsort((-scores.output[among], ~scores.measured[among]))  # an estimate is no rival of what was measured
    return bench, scores, among[best][: config.top]


def _some(config: SteerConfig) -> None:
    if not config.latent:
        raise ValueError(
            "no latent was named; choose with --latent N (`saebench steer rank --sae SAE` lists good ones)"
        )
