"""Evaluate dictionaries on held-out documents: reconstruction, fidelity of the spliced model, baselines.

Everything is measured on the same tokens: kept positions of the store's validation contexts, whose
vectors come from the model's own clean forward pass. At special tokens and in massive rows the vectors are
left alone in every arm, ablations included; positions that start at one of them, or that a special token
follows, are not scored.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saebench.config import Count, to_json
from saebench.evaluate.baselines import PCA, Baseline, LinearMap, untrained_fvus, widths
from saebench.evaluate.check import look_at_others
from saebench.evaluate.compare import BESIDE, DRAWS, FIGURES, LEAST_DOCUMENTS, write_draws
from saebench.evaluate.diffing import is_of_two_models
from saebench.evaluate.figures import figures, refitted_figures, resampled_metrics
from saebench.evaluate.measure import Batch, Dictionary, Measurement, Subject, silent_latents, validation_batches
from saebench.evaluate.neurons import neuron_fvus
from saebench.evaluate.planned import Planned, plan, say_what_is_not_refitted
from saebench.evaluate.sets import SetMeasurement, error_shares
from saebench.evaluate.spliced import spliced_baselines
from saebench.files import hash_files, read_json, write_json
from saebench.metrics import (
    total,
)
from saebench.models import ALL, LanguageModel, ModelDtype, check_hook, choose_device
from saebench.runlog import progress
from saebench.sae import Ends, ends_of, load_sae, read_config, take_in, update_metadata, weights_of, written_here
from saebench.sae.hub import SaePath
from saebench.store import Store, open_store
from saebench.store.norms import usual_moments
from saebench.store.source import model_of

_log = logging.getLogger(__name__)

EVALUATION = "evaluation.json"
_VERSION = 3  # of the figures' definitions: another one evaluates again


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Which SAEs to evaluate, on what."""

    run: Path
    """run directory: evaluates RUN/saes/*, and writes RUN/summary.json and RUN/report.html"""
    sae: tuple[SaePath, ...] = ()
    """SAEs elsewhere to evaluate as well, folders, files or hf:OWNER/REPO[@REVISION][/FOLDER]: of SAELens as they lie, of any other format as a copy in RUN/saes"""
    hook: str | None = None
    """hook that those of --sae read, where their files do not say"""
    model: str | None = None
    """model that those of --sae are of, where their files do not say"""
    set: str | None = None
    """name of a set that those of --sae belong to: transcoders that are measured together as well, in the place of all of their MLPs"""
    store: Path | None = None
    """activation store (default: the one each SAE was trained on)"""
    tokens: Count = 1_000_000
    """held-out tokens to use at most"""
    dead_rows: Count = 1_000_000
    """rows in which a latent must fire once not to count as dead (held-out and training rows, where the store has as many)"""
    batch: Count = 16
    """contexts in a forward pass"""
    refit: bool = False
    """measure each SAE a second time, with the coefficients that are best for the latents that fire, beside its encoder's"""
    splice_baselines: bool = False
    """splice the baselines into the model, too: their ΔCE, KL and loss recovered at each SAE's L0, by a second pass"""
    resamples: Count = 1000
    """bootstrap samples of documents behind each interval"""
    model_dtype: ModelDtype | None = None
    """how the model computes (default: as it did when the store was made)"""
    device: str | None = None
    """cuda or cpu (default: cuda where it is at hand), or all: a model that is too large for one GPU lies on all of them"""
    trust_remote_code: bool = False
    """run code that comes with a hub model"""
    force: bool = False
    """evaluate again what was evaluated with the same settings already"""


def evaluate(config: EvalConfig) -> list[Path]:
    """Evaluate every dictionary of a run; results go into each one's `evaluation.json` and metadata, those of sets into RUN/sets/NAME.

    Returns the dictionaries' directories. Clean and ablated losses are computed once for all that read and write the same hooks of a
    store. Raises ValueError when there is nothing to evaluate or dictionary, store and model do not belong together.
    """
    own = [path.parent for path in sorted((config.run / "saes").glob("*/cfg.json"))]
    folders = list(dict.fromkeys([*own, *(_in_reach(config, sae) for sae in config.sae)]))
    if not folders:
        raise ValueError(
            f"{config.run} has no SAEs in saes/; train some with `saebench train --out {config.run}`, or give --sae"
        )
    folders = [folder for folder in folders if not _of_two_models(folder)]
    if not folders:
        raise ValueError(
            f"{config.run} has crosscoders of two models alone; expected what one model reads and writes: use `saebench diff`"
        )
    everything = plan(config.run, folders, config.store)
    if config.refit:
        say_what_is_not_refitted(everything)
    groups: dict[tuple[Path, Ends, bool], list[Planned]] = {}
    for planned in everything:
        groups.setdefault((planned.store, planned.ends, planned.is_set), []).append(planned)
    alone = None if config.device == ALL else config.device  # of what is no model
    device = config.device if config.device == ALL else choose_device(alone, float64=True)
    models: dict[Path, LanguageModel] = {}
    for (path, ends, _), group in groups.items():
        store = open_store(path)
        for hook in ends.hooks:
            store.d_in(hook)  # says how to have one that it lacks
        if todo := [planned for planned in group if config.force or not _is_current(config, planned, store)]:
            for planned in todo:
                if not planned.is_set:
                    look_at_others(planned.folder, store, alone)
            if path not in models:  # one at a time
                models.clear()
                models[path] = model_of(store, device, config.model_dtype, trust_remote_code=config.trust_remote_code)
            _evaluate_group(config, store, models[path], todo)
    return folders


def _of_two_models(folder: Path) -> bool:
    """Whether a dictionary is left out, since one model is run here and not two; said where it is."""
    if not is_of_two_models(ends_of(folder, read_config(folder))):
        return False
    _log.warning("%s is of two models: its figures are those of `saebench diff --sae %s`", folder, folder)
    return True


def _in_reach(config: EvalConfig, sae: Path) -> Path:
    """Where the figures of an SAE can be written beside it: where it lies, or a copy. It says which set it belongs to, if one is given."""
    folder = sae
    if not written_here(sae):
        folder = take_in(sae, config.run / "saes", hook=config.hook, model=config.model, store=config.store)
    if config.set is not None:
        update_metadata(folder, set=config.set)
    return folder


def _identity(config: EvalConfig, planned: Planned, store: Store) -> dict[str, Any]:
    settings = {name: to_json(config)[name] for name in ("tokens", "dead_rows", "resamples")}
    members = {"members": [folder.name for folder in planned.members]} if planned.is_set else {}
    return {
        **settings,
        **({"refit": True} if config.refit and planned.refits else {}),
        **({"splice_baselines": True} if config.splice_baselines and not planned.is_set else {}),
        "model_dtype": config.model_dtype or store.manifest["identity"]["model_dtype"],
        "version": _VERSION,
        "store": store.hash,
        "weights": hash_files([file for folder in planned.members for file in weights_of(folder)]),
        **members,
    }


def _is_current(config: EvalConfig, planned: Planned, store: Store) -> bool:
    path = planned.folder / EVALUATION
    if not path.exists() or not (planned.folder / DRAWS).exists():
        return False
    found = read_json(path)["identity"]  # of one that has more, with the same besides, all that is wanted
    return all(found.get(name) == value for name, value in _identity(config, planned, store).items())


@torch.inference_mode()
def _evaluate_group(config: EvalConfig, store: Store, model: LanguageModel, group: list[Planned]) -> None:
    """All that read and write the same hooks of a store, and are sets or not."""
    ends, is_set, device = group[0].ends, group[0].is_set, str(model.device)
    for hook in ends.hooks:
        check_hook(model, hook)
    subjects = [Subject(planned.folder, _loaded(planned, store, device), ends) for planned in group]
    means = {hook: torch.from_numpy(usual_moments(store, hook)[0]).float().to(device) for hook in ends.writes}
    bounds = {hook: store.norms(hook).bound for hook in ends.hooks}
    baseline: Baseline | None = None
    if not is_set:
        baseline = PCA.fit(store, ends.reads, device) if ends.tied else LinearMap.fit(store, ends, device)
    refitted = [subject.refitted() for subject in subjects] if config.refit and group[0].refits else []
    kind = SetMeasurement if is_set else Measurement
    measured = kind(model, ends, means, baseline, [*subjects, *refitted], bounds)
    tokens = min(config.tokens, store.rows("validation"))
    with progress(tokens, f"evaluate {' → '.join(map('+'.join, dict.fromkeys(ends)))}") as bar:
        for batch in _batches(config, store, device):
            measured.add(batch)
            bar.update(batch.tokens.numel())
    rows = int(total(measured.shared[ends.writes[0]].table())["rows"])
    silent, seen = _silent(store, subjects, max(0, config.dead_rows - rows))
    untrained = [{} for _ in subjects] if is_set else _untrained(store, ends, subjects, rows, device)
    l0s = [float(total(subject.sums[ends.writes[0]].table())["l0"]) / rows for subject in subjects]
    if not is_set and (neurons := neuron_fvus(store, model, ends, l0s, bounds)) is not None:
        untrained = [fvus | {"neurons_fvu": [fvu]} for fvus, fvu in zip(untrained, neurons, strict=True)]
    spliced: list[dict[str, dict[str, float]]] = []
    if config.splice_baselines and baseline is not None:
        each = [(one.members[0].sae.d_sae, _seed(one), l0) for one, l0 in zip(subjects, l0s, strict=True)]
        spliced = spliced_baselines(store, measured, baseline, each, _batches(config, store, device))
    draws, documents = resampled_metrics(measured, config.resamples), len(measured.shared[ends.writes[0]].index)
    if documents < LEAST_DOCUMENTS:
        _log.warning(
            "%d held-out documents: no intervals and least differences, which need %d; harvest more --validation-tokens, or give more --tokens here",
            documents, LEAST_DOCUMENTS,
        )  # fmt: skip
    for place, (planned, subject) in enumerate(zip(group, subjects, strict=True)):
        dead = torch.cat([silent[member.folder] for member in subject.members])
        found = figures(subject, measured, draws[place], dead, rows + seen, untrained[place])
        if is_set:
            found["members"] = [str(folder) for folder in planned.members]
            found["metrics"]["error_share"], shares = error_shares(subject)
            for hook, share in shares.items():
                found["hooks"][hook]["metrics"]["error_share"] = share
        if spliced:
            found["spliced_baselines"] = spliced[place]
        if refitted:
            again = draws[len(subjects) + place]
            found["refitted"] = refitted_figures(refitted[place], measured, again, found["metrics"], draws[place])
        _write(config, planned, store, found, draws[place], documents)


def _batches(config: EvalConfig, store: Store, device: str) -> Iterator[Batch]:
    for batch in validation_batches(store, config.tokens, config.batch):
        yield Batch(*(column.to(device) for column in batch))


def _write(
    config: EvalConfig,
    planned: Planned,
    store: Store,
    found: dict[str, Any],
    draws: dict[str, np.ndarray],
    documents: int,
) -> None:
    """Figures and draws into the folder; the main ones into the metadata of a dictionary."""
    kept = ("l0", *FIGURES, *BESIDE) if documents >= LEAST_DOCUMENTS else ()
    sample = {"store": store.hash, "tokens": config.tokens, "resamples": config.resamples, "documents": documents}
    write_draws(planned.folder, {name: draws[name] for name in kept if name in draws}, sample)
    write_json(
        planned.folder / EVALUATION,
        {"identity": _identity(config, planned, store), "store": str(store.folder), **found},
    )
    if not planned.is_set:
        metrics, baselines = found["metrics"], found["baselines"]
        update_metadata(planned.folder, l0=metrics["l0"], evaluation={**metrics, "baselines": baselines})


def _loaded(planned: Planned, store: Store, device: str) -> list[Dictionary]:
    """The dictionaries. Raises ValueError for one whose widths are not those of its hooks."""
    found = []
    for folder, ends in planned.members.items():
        sae = load_sae(folder, device=device)
        read, written = widths(store, ends.reads), widths(store, ends.writes)
        if sae.d_in != sum(read):
            raise ValueError(
                f"{folder} takes vectors of {sae.d_in}, {', '.join(ends.reads)} in {store.folder} has {sum(read)}"
            )
        if sae.parts != written or (sae.tied and not ends.tied):
            raise ValueError(
                f"{folder} writes {'what it reads' if sae.tied else 'vectors'}, {' and '.join(map(str, sae.parts))} wide; "
                f"{', '.join(ends.writes)} in {store.folder} has {' and '.join(map(str, written))}"
            )
        found.append(Dictionary(folder, sae, ends))
    return found


def _silent(store: Store, subjects: list[Subject], rows: int) -> tuple[dict[Path, Tensor], int]:
    """(latents of each dictionary that never fired, training rows looked at)."""
    groups: dict[Ends, list[Dictionary]] = {}
    for member in (member for subject in subjects for member in subject.members):
        groups.setdefault(member.ends, []).append(member)
    found, seen = {}, 0
    for ends, members in groups.items():
        silent, seen = silent_latents(store, ends, members, rows)
        found |= {member.folder: silent_F for member, silent_F in zip(members, silent, strict=True)}
    return found, seen


def _untrained(
    store: Store, ends: Ends, subjects: list[Subject], rows: int, device: str
) -> list[dict[str, list[float]]]:
    """FVUs at each hook of an untrained dictionary of each one's width, seed and L0."""
    groups: dict[tuple[int, int], list[int]] = {}
    for place, subject in enumerate(subjects):
        groups.setdefault((subject.members[0].sae.d_sae, _seed(subject)), []).append(place)
    fvus: list[dict[str, list[float]]] = [{} for _ in subjects]
    for (d_sae, seed), places in groups.items():
        l0s = [float(total(subjects[place].sums[ends.writes[0]].table())["l0"]) / rows for place in places]
        for place, fvu in zip(places, untrained_fvus(store, ends, d_sae, l0s, seed, rows, device), strict=True):
            fvus[place] = {"untrained_fvu": fvu}
    return fvus


def _seed(subject: Subject) -> int:
    """That of its training, where it says."""
    return read_config(subject.folder)["metadata"].get("saebench", {}).get("identity", {}).get("seed", 0)
