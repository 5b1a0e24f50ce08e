"""How often a latent of a concept is silent because one of something narrower has taken its part over (Chanin et al. 2024, arXiv 2409.14507).

In the form of SAEBench, by projections on a probe: the model need not spell. Legend: N examples, C concepts, F latents, D what is read.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy import sparse
from torch import Tensor

from saebench.bench.concepts import Concepts, Examples, labelled, letters, parents_of, prompted
from saebench.bench.projections import Probe, absorbed_at, f1_of, fit_probe, main_latents
from saebench.bench.readings import l0_of, untrained_sae
from saebench.bench.results import Figure, Results, as_rate, as_shares, drawn_interval, interval
from saebench.config import Count
from saebench.evaluate.sets import set_of
from saebench.files import hash_files
from saebench.labels import labeller_of
from saebench.metrics import resampled
from saebench.models import choose_device
from saebench.runlog import progress
from saebench.sae import SAE, Ends, encode_sparse, ends_of, load_sae, read_config, weights_of
from saebench.sae.hub import SaePath
from saebench.store import Store
from saebench.store.source import model_of, store_for, store_of

log = logging.getLogger(__name__)

NAME, VERSION = "absorption", 4
LEAST = 10
"""words (of labels documents) that a concept needs among those that its probe is fitted on, and among those that it finds"""
_CONCEPTS = 5  # below which there is no interval of their mean


@dataclass(frozen=True, kw_only=True)
class AbsorptionConfig:
    """Which SAEs, and what they may have absorbed."""

    run: Path
    """run directory: its SAEs, and RUN/bench/absorption.json"""
    sae: tuple[SaePath, ...] = ()
    """SAEs, folders, files or hf:OWNER/REPO[@REVISION][/FOLDER] (default: all of the run)"""
    store: Path | None = None
    """activation store whose rows are read (default: the one each SAE was trained on)"""
    concepts: str = "letters"
    """letters: the first ones of words; python: kinds of keywords, signs and names; supersenses: what is above WordNet's; or a JSON file {parent: [literals of its children]}"""
    labeller: str | None = None
    """whose the literals are: python, tokens, prose, spacy:PIPELINE or wordnet:DIRECTORY (default: python of python)"""
    words: Literal["store", "prompt"] = "store"
    """whether vectors at words are the store's or, where it has too few, the model's own behind a short prompt"""
    per_word: Count = 4
    """rows of each word of a store at most"""
    most_words: Count = 20_000
    """words that the model is run on at most"""
    rows: Count = 30_000
    """training rows, and held-out ones, that are labelled at most"""
    tau: float = 0.03
    """a concept has another main latent where it raises F1 by more"""
    resamples: Count = 1000
    """bootstrap samples behind each interval"""
    seed: int = 0
    """of the bootstrap and of the untrained SAEs"""
    device: str | None = None
    """cuda or cpu (default: cuda where it is at hand)"""
    trust_remote_code: bool = False
    """run code that comes with a hub model"""


def absorption(config: AbsorptionConfig) -> list[Figure]:
    """Means over concepts of each SAE, and of untrained ones as wide and as sparse; those of every concept and of its children are in RUN/bench/absorption.json.

    Raises ValueError where scikit-learn is not there, there are no SAEs, or nothing is known of their rows.
    """
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ValueError("probes are fitted with scikit-learn: pip install 'saebench[probes]'") from error
    own = [path.parent for path in sorted((config.run / "saes").glob("*/cfg.json"))]
    folders = [folder for folder in config.sae or own if not set_of(folder, read_config(folder))[1]]  # alone is no sum
    if not folders:
        raise ValueError(
            f"{config.run} has no SAEs in saes/ that write a hook by themselves; train some with `saebench train --out {config.run}`, or give --sae"
        )
    groups: dict[tuple[Path, Ends], list[Path]] = {}
    for folder in folders:
        place = store_for(folder, config.store), ends_of(folder, read_config(folder))
        groups.setdefault(place, []).append(folder)
    names = [folder.name for folder in folders]
    results, found = Results(config.run / "bench" / f"{NAME}.json", NAME), []
    for (path, ends), group in groups.items():
        asked, sizes = Asked(config, store_of(group[0], path), ends), {}
        with progress(len(group), f"absorption at {ends}", "SAE", delay=1.0) as bar:
            for folder in group:
                name = folder.name if names.count(folder.name) == 1 else str(folder)
                sae = load_sae(folder, device=asked.device)
                alike = [k for d_sae, k in sizes if d_sae == sae.d_sae]
                sizes[sae.d_sae, l0_of(sae, ends.reads, asked.store, alike)] = None
                weights = {"weights": hash_files(weights_of(folder))}
                found += _kept(results, asked, name, weights, lambda sae=sae: sae)
                bar.update()
        for d_sae, k in sizes:
            name = f"untrained, {d_sae} latents, k {k}" + (f", {path.name}, {ends}" if len(groups) > 1 else "")
            found += _kept(results, asked, name, {"untrained": [d_sae, k]}, partial(asked.untrained, d_sae, k))
    return found


def _kept(
    results: Results, asked: "Asked", name: str, identity: dict[str, Any], make: Callable[[], SAE]
) -> list[Figure]:
    """The means over concepts of what an SAE is, or was, found to have."""
    unit, identity = f"{name}, {asked.config.concepts}", asked.identity | identity
    if (figures := results.get(unit, identity)) is None:
        figures = results.put(unit, identity, asked.figures(make(), name))
    return [each for each in figures if each.of == f"all {asked.config.concepts}"]


class Asked:
    """The concepts of a store at some hooks, and their probes: found when the first SAE needs them."""

    def __init__(self, config: AbsorptionConfig, store: Store, ends: Ends) -> None:
        self.config, self.store, self.ends = config, store, ends
        self.device = choose_device(config.device, float64=True)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that decides the figures but for the SAE."""
        config, told = self.config, ("tau", "resamples", "seed")
        found = {"version": VERSION, "store": self.store.hash, "ends": str(self.ends), "concepts": config.concepts}
        if config.concepts == "letters":
            told = (*told, "words", "per_word" if config.words == "store" else "most_words")
        else:
            told = (*told, "rows")
            labeller, parents = self._parents
            found |= {"parents": parents, "labeller": [labeller.name, labeller.version]}
        return found | {name: getattr(config, name) for name in told}

    @cached_property
    def _parents(self) -> Any:
        """(labeller, parent -> children). Raises ValueError where none is named."""
        usual, parents = parents_of(self.config.concepts)
        if not (name := self.config.labeller or usual):
            raise ValueError(
                f"concepts are {self.config.concepts!r}, and nothing says whose literals they are; give --labeller python, tokens, prose, "
                "spacy:PIPELINE or wordnet:DIRECTORY"
            )
        return labeller_of(name), parents

    @cached_property
    def concepts(self) -> Concepts:
        config = self.config
        if config.concepts != "letters":
            labeller, parents = self._parents
            return labelled(self.store, self.ends, labeller, parents, config.rows)
        if config.words == "store":
            return letters(self.store, self.ends, config.per_word)
        model = model_of(self.store, self.device, trust_remote_code=config.trust_remote_code)
        return prompted(model, self.ends, config.most_words)

    @cached_property
    def probes(self) -> dict[int, Probe]:
        """By the concept's number; none of a concept that holds, or is found, among too few words or documents."""
        train, test, found = self.concepts.train, self.concepts.test, {}
        names, few = self.concepts.names, []
        with progress(len(names), "fit probes", "concept", delay=1.0) as bar:
            for number, name in enumerate(names):
                if _clusters(train, train.holds[:, number]) >= LEAST <= _clusters(test, test.holds[:, number]):
                    probe = fit_probe(train.written, train.holds[:, number])
                    if _clusters(test, test.holds[:, number] & probe.finds(test.written)) >= LEAST:
                        found[number] = probe
                if number not in found:
                    few.append(name)
                bar.update()
        if few:
            log.warning(
                "%s left out: fewer than %d %s that the probe is fitted on, or that it finds among those held out%s",
                ", ".join(few), LEAST, "words" if self.config.concepts == "letters" else "documents",
                "; --words prompt runs the model over more words" if self.config.concepts == "letters" else "",
            )  # fmt: skip
        return found

    def untrained(self, d_sae: int, k: int) -> SAE:
        """A TopK dictionary as training begins it; its decoder rows, which overshoot, times the factor that is best for the training examples."""
        sae, train = untrained_sae(self.store, self.ends, d_sae, k, self.config.seed), self.concepts.train
        out_NE = torch.from_numpy(_activations(sae, train.read) @ sae.W_dec.numpy())
        sae.W_dec *= (out_NE * (train.written - sae.b_dec)).sum() / out_NE.pow(2).sum().clamp(min=1e-30)
        return sae.to(self.device)

    def figures(self, sae: SAE, name: str) -> list[Figure]:
        """Of an SAE: of each concept, its children, and all."""
        found: list[Figure] = []
        train_NF, test_NF = (_activations(sae, side.read) for side in (self.concepts.train, self.concepts.test))
        for number, concept in enumerate(self.concepts.names):
            if number in self.probes:
                found += self._concept(sae, name, number, train_NF, test_NF)
            else:
                found += [
                    Figure(name, concept, figure, None, None) for figure in ("full_absorption", "absorption_fraction")
                ]
        return found + self._means(found, name)

    def _concept(self, sae: SAE, name: str, number: int, train_NF: Any, test_NF: Any) -> list[Figure]:
        train, test, probe = self.concepts.train, self.concepts.test, self.probes[number]
        concept, holds, finds = self.concepts.names[number], test.holds[:, number], probe.finds(test.written)
        main, f1 = main_latents(train_NF, train.holds[:, number], self.config.tau)
        found_by_probe = int((holds & finds).sum())
        rows = np.flatnonzero(holds & finds & (len(main) > 0))  # where no latent is the concept's none can have left it
        absorbed = absorbed_at(sae, main, probe, test_NF[rows], test.read[rows], test.written[rows])
        masks = {concept: np.ones(len(rows), bool)}
        for place, (parent, child) in enumerate(self.concepts.children):
            if parent == number:
                masks[f"{concept} ⊃ {child}"] = test.children[rows, place]
        found = [
            Figure(name, of, figure, None, *self._rate(values[mask], test.cluster[rows][mask]), n=int(mask.sum()))
            for of, mask in masks.items()
            for figure, values in (("full_absorption", absorbed.full), ("absorption_fraction", absorbed.fraction))
        ]
        beside = {"main_latents": float(len(main)), "main_f1": f1, "probe_f1": f1_of(holds, finds)}
        return [
            *found,
            *(Figure(name, concept, figure, None, value, n=found_by_probe) for figure, value in beside.items()),
        ]

    def _rate(self, values: np.ndarray, cluster: np.ndarray) -> tuple[float | None, float | None, float | None]:
        """(mean, its 95% interval over clusters); no interval of fewer than ten."""
        clusters, of = np.unique(cluster, return_inverse=True)
        if not len(clusters):
            return None, None, None
        table = {"sum": np.bincount(of, values.astype(np.float64)), "n": np.bincount(of).astype(np.float64)}
        (sums,) = resampled([table], self.config.resamples, self.config.seed)
        rate, n = float(values.mean()), len(clusters)
        return rate, *as_rate(rate, *drawn_interval(rate, sums["sum"] / sums["n"], n), n)

    def _means(self, figures: Sequence[Figure], name: str) -> list[Figure]:
        """Over concepts, with Student's interval, of shares within 0 to 1; and how many were left out."""
        concepts, of = set(self.concepts.names), f"all {self.config.concepts}"
        found = []
        for figure in ("full_absorption", "absorption_fraction", "main_latents", "main_f1", "probe_f1"):
            mine = [each.value for each in figures if each.figure == figure and each.of in concepts]
            values = [value for value in mine if value is not None]
            ends = interval(values) if len(values) >= _CONCEPTS else (None, None)
            if ends[0] is not None and figure != "main_latents":
                ends = as_shares(*ends)
            found.append(
                Figure(name, of, figure, None, float(np.mean(values)) if values else None, *ends, n=len(values))
            )
        return [*found, Figure(name, of, "left_out", None, float(len(concepts) - len(self.probes)), n=len(self.probes))]


def _clusters(side: Examples, where: np.ndarray) -> int:
    return len(np.unique(side.cluster[where]))


def _activations(sae: SAE, read_ND: Float[Tensor, "N D"]) -> Any:
    """`[N, F]`, `scipy.sparse.csc_array`."""
    code, values = encode_sparse(sae, read_ND.to(sae.W_enc.device))
    entries = (values.cpu().numpy(), code.latents.cpu().numpy(), code.offsets.cpu().numpy())
    return sparse.csr_array(entries, (len(read_ND), sae.d_sae)).tocsc()
