"""How often a latent of a concept is silent because one of something narrower has taken its part over (Chanin et al. 2024, arXiv 2409.14507).

In the form of SAEBench, by projections on a probe: the model need not spell. Legend: N examples, C concepts, F latents,
D what is read, E what is written, n examples of one concept that its probe finds.
"""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse
from torch import Tensor

from saebench.bench.concepts import Concepts, Examples, labelled, letters, parents_of, prompted
from saebench.bench.results import Figure, Results
from saebench.config import Count
from saebench.files import hash_files
from saebench.labels import labeller_of
from saebench.metrics import resampled
from saebench.models import choose_device
from saebench.runlog import progress
from saebench.sae import SAE, Ends, encode_sparse, ends_of, load_sae, read_config, weights_of
from saebench.sae.architectures import normalized
from saebench.sae.hub import SaePath
from saebench.store import Store
from saebench.store.source import model_of, recorded_store, store_of

log = logging.getLogger(__name__)

NAME, VERSION = "absorption", 1
LEAST = 10
"""words (of labels documents) that a concept needs among those that its probe is fitted on, and among those that it finds"""
FULL_COSINE, PARTIAL_COSINE, SHARE, ABSORBERS, MOST = 0.025, 0.1, 0.4, 3, 10
"""SAEBench's: least cosines of the latents that absorb wholly and in part, least share of the projection that they carry, how many
absorb in part at most; and how many main latents a concept has at most"""
_CONCEPTS = 5  # below which there is no interval of their mean
_C = 0.01  # inverse strength of the probe's penalty, of coordinates of unit variance
_ROWS = 512  # made dense at once


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
    rows: Count = 100_000
    """training rows, and held-out ones, that are labelled at most"""
    tau: float = 0.03
    """a concept has another main latent where it raises F1 by more"""
    resamples: Count = 1000
    """bootstrap samples behind each interval"""
    seed: int = 0
    """of the bootstrap"""
    device: str | None = None
    """cuda or cpu (default: cuda where it is at hand)"""
    trust_remote_code: bool = False
    """run code that comes with a hub model"""


class Probe(NamedTuple):
    """A logistic regression on what is written."""

    weight_E: Float[np.ndarray, " E"]
    bias: float

    def finds(self, written_NE: Float[Tensor, "N E"]) -> Bool[np.ndarray, " N"]:
        return written_NE.numpy() @ self.weight_E + self.bias > 0

    @property
    def direction_E(self) -> Float[np.ndarray, " E"]:
        return self.weight_E / np.linalg.norm(self.weight_E)


class Absorbed(NamedTuple):
    """What became of examples of a concept."""

    full: Bool[np.ndarray, " n"]
    fraction: Float[np.ndarray, " n"]


def absorption(config: AbsorptionConfig) -> list[Figure]:
    """Means over concepts of each SAE; those of every concept and of its children are in RUN/bench/absorption.json.

    Raises ValueError where scikit-learn is not there, there are no SAEs, or nothing is known of their rows.
    """
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ValueError("probes are fitted with scikit-learn: pip install 'saebench[probes]'") from error
    folders = list(config.sae) or [path.parent for path in sorted((config.run / "saes").glob("*/cfg.json"))]
    if not folders:
        raise ValueError(
            f"{config.run} has no SAEs in saes/; train some with `saebench train --out {config.run}`, or give --sae"
        )
    groups: dict[tuple[Path, Ends], list[Path]] = {}
    for folder in folders:
        store = config.store or recorded_store(folder)
        if store is None:
            raise ValueError(f"{folder} does not say what it was trained on; give a store of its hook with --store")
        groups.setdefault((store, ends_of(folder, read_config(folder))), []).append(folder)
    results, found = Results(config.run / "bench" / f"{NAME}.json", NAME), []
    for (path, ends), group in groups.items():
        asked = Asked(config, store_of(group[0], path), ends)
        with progress(len(group), f"absorption at {ends}", "SAE", delay=1.0) as bar:
            for folder in group:
                unit = f"{folder.name}, {config.concepts}"
                identity = asked.identity | {"weights": hash_files([weights_of(folder)])}
                if (figures := results.get(unit, identity)) is None:
                    figures = results.put(
                        unit, identity, asked.figures(load_sae(folder, device=asked.device), folder.name)
                    )
                found += [each for each in figures if each.of == f"all {config.concepts}"]
                bar.update()
    return found


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
            return labelled(self.store, self.ends, *self._parents, config.rows)
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
        rows = np.flatnonzero(holds & finds)
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
        beside = {"main_latents": float(len(main)), "main_f1": f1, "probe_f1": _f1(holds, finds)}
        return [*found, *(Figure(name, concept, figure, None, value, n=len(rows)) for figure, value in beside.items())]

    def _rate(self, values: np.ndarray, cluster: np.ndarray) -> tuple[float | None, float | None, float | None]:
        """(mean, its 95% interval by a bootstrap over clusters); no interval of fewer than ten."""
        clusters, of = np.unique(cluster, return_inverse=True)
        if not len(clusters):
            return None, None, None
        if len(clusters) < LEAST:
            return float(values.mean()), None, None
        table = {"sum": np.bincount(of, values.astype(np.float64)), "n": np.bincount(of).astype(np.float64)}
        (sums,) = resampled([table], self.config.resamples, self.config.seed)
        low, high = np.quantile(sums["sum"] / sums["n"], (0.025, 0.975))
        return float(values.mean()), float(low), float(high)

    def _means(self, figures: Sequence[Figure], name: str) -> list[Figure]:
        """Over concepts, with a bootstrap over them; and how many were left out."""
        concepts, of = set(self.concepts.names), f"all {self.config.concepts}"
        found = []
        for figure in ("full_absorption", "absorption_fraction", "main_latents", "main_f1", "probe_f1"):
            mine = [each.value for each in figures if each.figure == figure and each.of in concepts]
            values = np.array([value for value in mine if value is not None], np.float64)
            low = high = None
            if len(values) >= _CONCEPTS:
                (sums,) = resampled([{"sum": values}], self.config.resamples, self.config.seed)
                low, high = np.quantile(sums["sum"] / len(values), (0.025, 0.975)).tolist()
            found.append(
                Figure(name, of, figure, None, float(values.mean()) if len(values) else None, low, high, len(values))
            )
        return [*found, Figure(name, of, "left_out", None, float(len(concepts) - len(self.probes)), n=len(self.probes))]


def fit_probe(written_NE: Float[Tensor, "N E"], holds: Bool[np.ndarray, " N"]) -> Probe:
    """Logistic regression with an L2 penalty on coordinates of unit variance, both classes of equal weight."""
    x_NE = written_NE.double().numpy()
    mean_E, std_E = x_NE.mean(0), x_NE.std(0)
    std_E = np.where(std_E > 1e-9 * std_E.max(), std_E, np.inf)  # a constant coordinate says nothing
    model = _logistic((x_NE - mean_E) / std_E, holds, _C)
    weight_E = model.coef_[0] / std_E
    return Probe(weight_E, float(model.intercept_[0] - mean_E @ weight_E))


def _logistic(x: np.ndarray, holds: np.ndarray, C: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=C, class_weight="balanced", max_iter=300).fit(x, holds)


def main_latents(acts_NF: Any, holds: Bool[np.ndarray, " N"], tau: float) -> tuple[Int[np.ndarray, " S"], float]:
    """(the latents that a concept is split over, F1 of a logistic regression on them), of training examples.

    The first is the latent with the largest difference of class means, in units of its mean where it fires; each next one that of the
    largest difference between examples of the concept that the regression has missed so far and those of others. One that
    does not raise F1, at its best threshold, by more than `tau` ends it. `acts_NF` is CSC.
    """
    fires_F = np.diff(acts_NF.indptr)
    total_F = np.asarray(acts_NF.sum(0)).ravel()
    unit_F = np.divide(total_F, fires_F, out=np.full(len(total_F), np.inf), where=fires_F > 0)
    others_F = np.asarray(acts_NF[~holds].mean(0)).ravel()
    main: list[int] = []
    missed, best = holds.copy(), 0.0
    while len(main) < MOST and missed.any():
        score_F = (np.asarray(acts_NF[missed].mean(0)).ravel() - others_F) / unit_F
        score_F[main] = -np.inf
        if score_F.max() <= 0:
            break
        tried = [*main, int(score_F.argmax())]
        f1, found = _best_f1(
            _logistic(acts_NF[:, tried].toarray() / unit_F[tried], holds, 1.0), acts_NF, tried, unit_F, holds
        )
        if main and f1 - best <= tau:
            break
        main, best, missed = tried, f1, holds & ~found
    return np.array(main, np.int64), best


def _best_f1(
    model: Any, acts_NF: Any, latents: list[int], unit_F: np.ndarray, holds: np.ndarray
) -> tuple[float, Bool[np.ndarray, " N"]]:
    """(F1 at the threshold that makes it largest, what is above it)."""
    score = model.decision_function(acts_NF[:, latents].toarray() / unit_F[latents])
    of = np.unique(-score, return_inverse=True)[1]  # the highest score first
    said = np.bincount(of).cumsum()
    true = np.bincount(of, holds.astype(np.float64)).cumsum()
    f1 = 2 * true / (said + holds.sum())
    return float(f1.max()), of <= f1.argmax()


def _f1(holds: np.ndarray, finds: np.ndarray) -> float | None:
    total = int(holds.sum() + finds.sum())
    return float(2 * (holds & finds).sum() / total) if total else None


@torch.no_grad()
def absorbed_at(
    sae: SAE,
    main: Int[np.ndarray, " S"],
    probe: Probe,
    acts_nF: Any,
    read_nD: Float[Tensor, "n D"],
    written_nE: Float[Tensor, "n E"],
) -> Absorbed:
    """Which examples of a concept, found by its probe, its main latents have left to others.

    With p the probe's direction, d_j the decoder row and a_j the activation of latent j, latent j carries a_j d_j·p of
    (y − b)·p, y what is to be written and b what the SAE writes where nothing fires. `full`: no main latent fires, (y − b)·p > 0, and the
    latent that carries most has cos(d_j, p) ≥ 0.025 and carries at least 0.4 of it. `fraction`: of the three others that carry most, among
    those of cos ≥ 0.1, A together, and M the main ones': 0 where M is all of it or more, or A less than 0.4 of it; 1 where
    M ≤ 0; else m/(m + M), m = min(A, (y − b)·p − M).
    """
    rows_nD, scale, shift = normalized(read_nD.to(sae.W_dec.device), sae.normalize)
    wanted_nE = (written_nE.to(sae.W_dec.device) - shift) / scale - sae.base(rows_nD)
    p_E = torch.from_numpy(probe.direction_E).to(wanted_nE)
    whole_n = (wanted_nE @ p_E).double().cpu().numpy()
    along_F = (sae.W_dec @ p_E).double().cpu().numpy()
    cosine_F = along_F / sae.W_dec.norm(dim=1).clamp(min=1e-30).double().cpu().numpy()
    others_F = cosine_F >= PARTIAL_COSINE
    others_F[main] = False
    parts = [Absorbed(np.zeros(0, bool), np.zeros(0))]
    acts_nF = acts_nF.tocsr()
    for start in range(0, len(whole_n), _ROWS):
        acts_rF, whole_r = acts_nF[start : start + _ROWS].toarray().astype(np.float64), whole_n[start : start + _ROWS]
        carried_rF = acts_rF * along_F
        top_r = carried_rF.argmax(1)
        most_r = np.take_along_axis(carried_rF, top_r[:, None], 1)[:, 0]
        silent_r = (acts_rF[:, main] == 0).all(1)
        full_r = silent_r & (whole_r > 0) & (cosine_F[top_r] >= FULL_COSINE) & (most_r >= SHARE * whole_r)
        taken_rF = np.sort(np.where(others_F, carried_rF, 0.0).clip(min=0), axis=1)[:, -ABSORBERS:]
        parts.append(Absorbed(full_r, _fractions(whole_r, carried_rF[:, main].sum(1), taken_rF.sum(1))))
    return Absorbed(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _fractions(
    whole_n: Float[np.ndarray, " n"], main_n: Float[np.ndarray, " n"], others_n: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    absorbed_n = np.minimum(others_n, whole_n - main_n)
    with np.errstate(divide="ignore", invalid="ignore"):
        part_n = np.where(main_n <= 0, 1.0, absorbed_n / (absorbed_n + main_n))
    none_n = (whole_n <= 0) | (main_n >= whole_n) | (others_n < SHARE * whole_n)
    return np.where(none_n, 0.0, part_n)


def _clusters(side: Examples, where: np.ndarray) -> int:
    return len(np.unique(side.cluster[where]))


def _activations(sae: SAE, read_ND: Float[Tensor, "N D"]) -> Any:
    """`[N, F]`, `scipy.sparse.csc_array`."""
    code, values = encode_sparse(sae, read_ND.to(sae.W_enc.device))
    entries = (values.cpu().numpy(), code.latents.cpu().numpy(), code.offsets.cpu().numpy())
    return sparse.csr_array(entries, (len(read_ND), sae.d_sae)).tocsc()
