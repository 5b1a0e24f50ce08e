"""An index in other forms: SAEDashboard's batches, Neuronpedia's upload bodies, a page to share."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.sparse import csc_matrix

from saebench.config import Count
from saebench.files import write_text
from saebench.index.examples import Shown, show_all
from saebench.index.explanations import Explanation, read_explanations
from saebench.index.names import Names
from saebench.index.needs import read_needs
from saebench.index.notes import Notes
from saebench.index.page import Evidence, latents_page
from saebench.index.plan import IndexConfig
from saebench.index.reader import Example, FeatureIndex, Latent, open_feature_index
from saebench.models import parse_hook
from saebench.runlog import progress
from saebench.sae import SAE, load_sae
from saebench.sae.hub import SaePath

log = logging.getLogger(__name__)

BATCH = 128  # features in a file; Neuronpedia takes no more
TEXT_LIMIT = 512  # characters of an explanation, by Neuronpedia
TOKEN_LIMIT = 1024  # tokens of an activation, by Neuronpedia
LOGIT_LIMIT = 20  # tokens of topLogits and bottomLogits, by Neuronpedia
ON_A_PAGE = 500
_ENCODED = 256  # latents whose examples are encoded together, each row once
_COLUMNS = 3  # neurons and features in SAEDashboard's tables

Format = Literal["html", "neuronpedia", "saedashboard"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Which latents of an indexed SAE to write, and as what."""

    sae: SaePath
    """SAE directory, indexed"""
    format: Format
    """html: one page to share; neuronpedia: upload bodies; saedashboard: batch-N.json"""
    out: Path
    """file to write (html), or folder"""
    latents: tuple[Count, ...] = ()
    """numbers of latents (default: all that fire)"""
    store: Path | None = None
    """activation store (default: the one that was indexed)"""
    index: Path | None = None
    """index file (default: index/NAME.h5 beside the folder saes/ that holds the SAE)"""
    around: Count | None = 16
    """tokens on either side of an example's peak"""
    model_id: str | None = None
    """the model's name there (default: its name here)"""
    source: str | None = None
    """the SAE's name there, such as 2-topk-k48 (default: its layer and directory)"""


def export(config: ExportConfig) -> list[Path]:
    """Write latents in the form wanted; returns the files. Each file is whole or not there.

    Latents that never fire are left out. Raises ValueError for a latent that the SAE lacks, an index that is not there or not
    complete, too many latents for one page, a folder that is in use, and a body that Neuronpedia would refuse.
    """
    if config.format != "html" and config.out.exists() and any(config.out.iterdir()):
        raise ValueError(
            f"{config.out} is not empty; name a new folder with --out, so that no older files are among the new"
        )
    if config.format == "html" and config.out.is_dir():
        raise ValueError(f"{config.out} is a folder; name a file with --out, such as {config.out / 'latents.html'}")
    sae = load_sae(config.sae)
    path = config.index or IndexConfig(sae=config.sae).path
    with open_feature_index(path, sae=config.sae, store=config.store) as index:
        if not index.complete:
            raise ValueError(f"{path} is not complete; finish it with `saebench index --sae {config.sae}`")
        wanted = _wanted(config, index)
        notes = Notes(path.with_suffix(".notes.json"), index.identity["sae"], index.d_sae)
        names = Names(index, notes, read_explanations(index), read_needs(index))
        with progress(len(wanted), f"export {config.sae.name}", "latent") as bar:
            found = _evidence(index, sae, names, notes, wanted, config.around, bar.update)
            if config.format == "html":
                write_text(config.out, latents_page(config.sae.name, index, found))
                return [config.out]
            return _write_batches(config, index, sae, found)


def _wanted(config: ExportConfig, index: FeatureIndex) -> list[int]:
    for latent in config.latents:
        if latent >= index.d_sae:
            raise ValueError(f"latent is {latent}; {config.sae} has 0 to {index.d_sae - 1}")
    asked = np.array(config.latents or range(index.d_sae))
    fires = index.columns["fires"][asked] > 0
    if (~fires).any():
        log.info("%d of %d latents never fire in the index and are left out", (~fires).sum(), len(asked))
    wanted = [int(latent) for latent in asked[fires]]
    if not wanted:
        raise ValueError("none of these latents fires in the index; choose others with --latents")
    if config.format == "html" and len(wanted) > ON_A_PAGE:
        raise ValueError(f"{len(wanted)} latents are too many for one page; choose up to {ON_A_PAGE} with --latents")
    return wanted


def _evidence(
    index: FeatureIndex,
    sae: SAE,
    names: Names,
    notes: Notes,
    wanted: Sequence[int],
    around: int | None,
    done: Callable[[int], Any],
) -> Iterator[Evidence]:
    for first in range(0, len(wanted), _ENCODED):
        latents = [index[latent] for latent in wanted[first : first + _ENCODED]]
        asked = [(latent.latent, example) for latent in latents for example in _examples(latent)]
        shown = iter(show_all(index, sae, asked, around))
        for latent in latents:
            top = [next(shown) for _ in latent.top]
            groups = [[next(shown) for _ in interval.examples] for interval in latent.intervals]
            yield Evidence(latent, names[latent.latent], notes[latent.latent], top, groups)
            done(1)


def _examples(latent: Latent) -> list[Example]:
    return [*latent.top, *(example for interval in latent.intervals for example in interval.examples)]


def _write_batches(config: ExportConfig, index: FeatureIndex, sae: SAE, found: Iterator[Evidence]) -> list[Path]:
    usual_id, usual_source = names_there(index, config.sae)
    model_id, source, explained = config.model_id or usual_id, config.source or usual_source, read_explanations(index)
    correlated = Correlated(index) if config.format == "saedashboard" else None
    files: list[Path] = []
    batch: list[dict[str, Any]] = []

    def flush() -> None:
        if correlated is not None:
            body = {"model_id": model_id, "layer": _layer(index), "sae_set": source, "sae_id_suffix": None}
        else:
            body = {"modelId": model_id, "source": source}
        body |= {"features": batch}
        if correlated is None:
            check_neuronpedia(body)
        files.append(config.out / f"batch-{len(files)}.json")
        write_text(files[-1], json.dumps(body, ensure_ascii=False, allow_nan=False))

    for evidence in found:
        if correlated is not None:
            batch.append(_dashboard_feature(evidence, index, sae, correlated))
        else:
            batch.append(_neuronpedia_feature(evidence, index, explained.get(evidence.latent.latent)))
        if len(batch) == BATCH:
            flush()
            batch = []
    if batch:
        flush()
    return files


def names_there(index: FeatureIndex, sae: Path) -> tuple[str, str]:
    """(name of the model, name of the SAE) by which others are told of them, unless other names are given."""
    return Path(index.store.manifest["identity"]["model"]["id"]).name, f"{_layer(index)}-{sae.name}"


def _layer(index: FeatureIndex) -> int:
    """That of what is written, of several hooks the first."""
    return parse_hook(index.ends.writes[0])[0]


# --------------------------------------------------------------------------------------- Neuronpedia


def _neuronpedia_feature(evidence: Evidence, index: FeatureIndex, explained: Explanation | None) -> dict[str, Any]:
    latent = evidence.latent
    activations = [_activation(shown) for shown in evidence.top]
    for interval, group in zip(latent.intervals, evidence.intervals, strict=True):
        bounds = {
            "quantileMin": _number(interval.lower),
            "quantileMax": _number(interval.upper),
            "quantileFraction": _number(interval.fires / latent.figures["fires"]),
        }
        activations += [_activation(shown) | bounds for shown in group]
    explanations = []
    if evidence.name.explained:
        yours = evidence.name.source == "yours"
        score = f" ({evidence.name.scored} on held-out text)" if evidence.name.scored and not yours else ""
        text = _plain(evidence.name.text)[: TEXT_LIMIT - len(score)] + score
        method = "hand-written" if yours else f"saebench-{evidence.name.source}"
        explanations.append({"text": text, "methodName": method})
    if explained is not None and explained.text and evidence.name.source != "judge":
        explanations.append({"text": explained.text[:TEXT_LIMIT], "methodName": explained.method})
    return {
        "index": latent.latent,
        "density": _number(latent.figures["density"]),
        "topLogits": _logits(index, latent.top_logits),
        "bottomLogits": _logits(index, latent.bottom_logits),
        "explanations": explanations,
        "activations": activations,
    }


def _activation(shown: Shown) -> dict[str, Any]:
    return {
        "tokens": [_plain(piece) for piece in shown.context.pieces],
        "values": _numbers(shown.values),
    }


def _logits(index: FeatureIndex, ranked: Any) -> list[dict[str, Any]]:
    pieces = index.pieces(ranked.ids)
    return [
        {"token": _plain(piece), "value": _number(value)}
        for piece, value in zip(pieces, ranked.values.tolist(), strict=True)
    ]


def check_neuronpedia(body: dict[str, Any]) -> None:
    """Raises ValueError naming what of an upload body is outside Neuronpedia's limits."""

    def at_most(what: str, size: int, limit: int, least: int = 0) -> None:
        if not least <= size <= limit:
            raise ValueError(f"{what}: {size}; Neuronpedia takes {least} to {limit}")

    for name in ("modelId", "source"):
        if not body.get(name):
            raise ValueError(f"{name} is {body.get(name)!r}; Neuronpedia needs a name")
    at_most("features in a body", len(body["features"]), BATCH, 1)
    for feature in body["features"]:
        name = f"latent {feature['index']}"
        for side in ("topLogits", "bottomLogits"):
            at_most(f"{name}, {side}", len(feature.get(side, [])), LOGIT_LIMIT)
        for explanation in feature.get("explanations", []):
            at_most(f"{name}, characters of an explanation", len(explanation["text"]), TEXT_LIMIT, 1)
        if not feature["activations"]:
            raise ValueError(f"{name} has no activations; Neuronpedia needs at least one")
        for activation in feature["activations"]:
            n_tokens, n_values = len(activation["tokens"]), len(activation["values"])
            at_most(f"{name}, tokens of an activation", n_tokens, TOKEN_LIMIT, 1)
            if n_tokens != n_values:
                raise ValueError(f"{name} has an activation of {n_tokens} tokens and {n_values} values")


# -------------------------------------------------------------------------------------- SAEDashboard


class Correlated:
    """The latents whose activations go with a latent's, over the index's sampled rows."""

    def __init__(self, index: FeatureIndex) -> None:
        sample = index.sample("train")
        n_rows = len(sample.rows)
        rows_N = np.repeat(np.arange(n_rows), np.diff(sample.offsets))
        self._acts_RF = csc_matrix(
            (sample.values.astype(np.float64), (rows_N, sample.latents)), shape=(n_rows, index.d_sae)
        )
        self._mean_F = np.asarray(self._acts_RF.mean(0))[0] if n_rows else np.zeros(index.d_sae)
        self._squares_F = np.asarray(self._acts_RF.multiply(self._acts_RF).sum(0))[0]
        self._n_rows = max(n_rows, 1)

    def __call__(self, latent: int) -> tuple[list[int], list[float], list[float]]:
        """(latents, cosines of activations, Pearson correlations), highest correlation first."""
        products_F = np.asarray((self._acts_RF.T @ self._acts_RF[:, [latent]]).todense())[:, 0]
        with np.errstate(divide="ignore", invalid="ignore"):
            cosine_F = products_F / np.sqrt(self._squares_F * self._squares_F[latent])
            variance_F = self._squares_F / self._n_rows - self._mean_F**2
            covariance_F = products_F / self._n_rows - self._mean_F * self._mean_F[latent]
            pearson_F = covariance_F / np.sqrt(variance_F * variance_F[latent])
        pearson_F = np.nan_to_num(pearson_F, nan=-1.0, posinf=-1.0, neginf=-1.0)
        pearson_F[latent] = -1.0
        best = [int(other) for other in np.argsort(-pearson_F, kind="stable")[:_COLUMNS] if products_F[other] > 0]
        return best, _numbers(cosine_F[best]), _numbers(pearson_F[best])


def _dashboard_feature(evidence: Evidence, index: FeatureIndex, sae: SAE, correlated: Correlated) -> dict[str, Any]:
    """A feature of `batch-N.json`. Left empty, as this index has no such figures: correlated_neurons_*, vector."""
    latent = evidence.latent
    row_D = sae.W_dec[latent.latent].detach().cpu().float().numpy()
    aligned = np.argsort(-row_D, kind="stable")[:_COLUMNS]
    others, cosines, pearsons = correlated(latent.latent)
    filled = np.flatnonzero(latent.histogram)
    shown = slice(filled[0], filled[-1] + 1)
    edges = index.bin_edges.clip(max=latent.figures["max"])  # the last has no end
    centres = (edges[:-1] + edges[1:]) / 2
    counts, low, high = latent.logit_histogram
    logit_edges = np.linspace(low, high, len(counts) + 1)
    peak = latent.figures["max"]
    activations = [_dashboard_activation(each, -1.0, peak, -1.0) for each in evidence.top]
    for interval, group in zip(latent.intervals, evidence.intervals, strict=True):
        share = interval.fires / latent.figures["fires"]
        activations += [_dashboard_activation(each, interval.lower, interval.upper, share) for each in group]
    return {
        "feature_index": latent.latent,
        "neuron_alignment_indices": [int(place) for place in aligned],
        "neuron_alignment_values": _numbers(row_D[aligned]),
        "neuron_alignment_l1": _numbers(np.abs(row_D[aligned]) / np.abs(row_D).sum()),
        "correlated_neurons_indices": [],
        "correlated_neurons_l1": [],
        "correlated_neurons_pearson": [],
        "correlated_features_indices": others,
        "correlated_features_l1": cosines,
        "correlated_features_pearson": pearsons,
        "neg_str": [_plain(piece) for piece in index.pieces(latent.bottom_logits.ids)],
        "neg_values": _numbers(latent.bottom_logits.values),
        "pos_str": [_plain(piece) for piece in index.pieces(latent.top_logits.ids)],
        "pos_values": _numbers(latent.top_logits.values),
        "frac_nonzero": _number(latent.figures["density"]),
        "freq_hist_data_bar_values": _numbers(centres[shown]),
        "freq_hist_data_bar_heights": [int(count) for count in latent.histogram[shown]],
        "logits_hist_data_bar_values": _numbers((logit_edges[:-1] + logit_edges[1:]) / 2),
        "logits_hist_data_bar_heights": [int(count) for count in counts],
        "n_prompts_total": index.n_rows // index.context,
        "n_tokens_in_prompt": index.context,
        "dataset": str(index.store.manifest["identity"]["text"]["dataset"]),
        "decoder_weights_dist": [],
        "vector": [],
        "activations": activations,
    }


def _dashboard_activation(shown: Shown, low: float, high: float, share: float) -> dict[str, Any]:
    bounds = {"bin_min": _number(low), "bin_max": _number(high), "bin_contains": _number(share)}
    return bounds | _activation(shown) | {"qualifying_token_index": shown.context.peak}


# ------------------------------------------------------------------------------------------- values


def _plain(text: str) -> str:
    """NUL as its picture: databases refuse it in a text."""
    return text.replace("\x00", "␀")


def _number(value: float) -> float:
    """Four significant figures; more would double the files."""
    return float(f"{value:.4g}")


def _numbers(values: np.ndarray) -> list[float]:
    return [_number(value) for value in values.tolist()]
