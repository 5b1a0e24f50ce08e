"""`summary.json` and `report.html` of a run, from what training and evaluation left on disk."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from saebench.evaluate.compare import (
    FIGURES,
    evaluated,
    least_differences,
    over_seeds,
    recipes,
    undecided,
)
from saebench.evaluate.evaluate import EVALUATION
from saebench.evaluate.frontiers import at_equal_l0
from saebench.evaluate.page import page
from saebench.evaluate.sets import SETS, set_of
from saebench.files import found_from, hash_files, read_json, write_json, write_text
from saebench.models import model_path
from saebench.runlog import read_metrics
from saebench.sae import Ends, ends_of, read_config, weights_of
from saebench.sae.formats import CONFIG
from saebench.store import open_store
from saebench.store.source import model_name, recorded_store

SUMMARY = "summary.json"
REPORT = "report.html"


def summarise(folders: list[Path]) -> list[dict[str, Any]]:
    """The entry in `summary.json` of each dictionary that has figures of its own. Paths are relative to the working directory where they can be."""
    entries = []
    for folder in folders:
        config = read_config(folder)
        if set_of(folder, config)[1]:  # a part of a sum
            continue
        evaluation, ends = read_json(folder / EVALUATION), ends_of(folder, config)
        own = config["metadata"].get("saebench", {})
        training = {
            "tokens_trained": own.get("tokens_trained"),
            "seconds": own.get("seconds"),
            "lambda": own.get("lambda"),
        }
        architecture, kind = architecture_of(config)
        entries.append({
            "name": folder.name, "path": relative(folder), "architecture": architecture, "kind": kind,
            "hook": _shown(ends), "reads": list(ends.reads), "writes": list(ends.writes), "d_in": config["d_in"], "d_sae": config["d_sae"],
            **evaluation["metrics"], **training, "baselines": evaluation["baselines"],
            "intervals": evaluation["intervals"], "small_denominators": evaluation["small_denominators"],
            "store": None if (store := _evaluated_on(folder, evaluation)) is None else str(store), "evaluated_on": evaluation["identity"]["store"],
            **({"refitted": {**refitted["metrics"], **{name: refitted[name] for name in ("intervals", "change")}}} if (refitted := evaluation.get("refitted")) else {}),
            **({"spliced_baselines": evaluation["spliced_baselines"]} if "spliced_baselines" in evaluation else {}),
            "seed": own.get("identity", {}).get("seed"), "recipe": _recipe(own), "control": own.get("identity", {}).get("control"),
        })  # fmt: skip
    return entries


def _evaluated_on(folder: Path, evaluation: dict[str, Any]) -> Path | None:
    """The store that the figures are of; an evaluation of before it was written down says only which one the dictionary was trained on."""
    return found_from(folder, Path(evaluation["store"])) if "store" in evaluation else recorded_store(folder)


def _recipe(own: dict[str, Any]) -> str | None:
    """A hash of all that decides a dictionary's weights but its seed; None where it was not trained here."""
    identity = {name: value for name, value in own.get("identity", {}).items() if name not in ("seed", "order", "name")}
    return xxhash.xxh3_64_hexdigest(json.dumps(identity, sort_keys=True).encode()) if identity else None


def summarise_sets(run: Path, folders: list[Path]) -> list[dict[str, Any]]:
    """The entry in `summary.json` of each set that dictionaries belong to."""
    entries = []
    for name in sorted({set_of(folder, read_config(folder))[0] for folder in folders} - {""}):
        evaluation = read_json(run / SETS / name / EVALUATION)
        members = [folder for folder in folders if set_of(folder, read_config(folder))[0] == name]
        entries.append({
            "name": name, "members": [folder.name for folder in members], "joint": set_of(members[0], read_config(members[0]))[1],
            "writes": list(evaluation["hooks"]), **evaluation["metrics"], "hooks": evaluation["hooks"],
            "intervals": evaluation["intervals"], "small_denominators": evaluation["small_denominators"],
        })  # fmt: skip
    return entries


def architecture_of(config: dict[str, Any]) -> tuple[str, str]:
    """(architecture, kind) of a `cfg.json`, whose transcoders are ReLU ones unless they say otherwise."""
    name, kind = config["architecture"], "SAE"
    for suffix in ("skip_transcoder", "transcoder", "crosscoder"):
        if name.endswith(suffix):
            name, kind = name.removesuffix(suffix).rstrip("_") or "relu", suffix.replace("_", " ")
            break
    trained_as = config["metadata"].get("training_architecture") or name  # BatchTopK is saved as JumpReLU
    return {"standard": "relu", "matryoshka_batchtopk": "matryoshka"}.get(trained_as, trained_as), kind


def _shown(ends: Ends) -> str:
    """The hooks, in words."""
    return " → ".join("+".join(hooks) for hooks in dict.fromkeys(ends))


def relative(path: Path | str) -> str:
    """A path from the working directory, or as it is when it lies elsewhere."""
    absolute = Path(path).resolve()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(path)


def short_names(folders: Collection[Path]) -> dict[Path, str]:
    """What folders are called, or their paths where two are called the same."""
    names = [folder.name for folder in folders]
    return {folder: folder.name if names.count(folder.name) == 1 else relative(folder) for folder in folders}


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Which runs to report on together."""

    run: tuple[Path, ...]
    """run directories, evaluated"""
    out: Path | None = None
    """folder for summary.json and report.html (default: of one run its own, of several `report`)"""


def report(config: ReportConfig, more: Sequence[list[list[str]]] = ()) -> tuple[dict[str, Any], Path]:
    """Report on one run anew, or on several as on one, their dictionaries named RUN/NAME; returns the summary and its folder.

    `more` are tables, headings and rows, to be shown behind its own. Raises ValueError for a run without evaluated dictionaries.
    """
    runs = {run: _evaluated_in(run) for run in dict.fromkeys(config.run)}
    out = config.out or (config.run[0] if len(runs) == 1 else Path("report"))
    return _write(out, runs, None, None, more), out


def _evaluated_in(run: Path) -> list[Path]:
    """Directories of the dictionaries that have figures: those of the run, and those elsewhere that its summary names."""
    named = (
        [found_from(run, Path(sae["path"])) for sae in read_json(run / SUMMARY)["saes"]]
        if (run / SUMMARY).exists()
        else []
    )
    own = [path.parent for path in sorted((run / "saes").glob("*/cfg.json"))]
    inside = {folder.name: folder for folder in own}
    folders = [*own, *(folder for folder in named if not _is_copied(folder, inside.get(folder.name)))]
    found = [
        f for f in folders if (f / EVALUATION).exists() or ((f / CONFIG).exists() and set_of(f, read_config(f))[1])
    ]
    if not found:
        raise ValueError(f"{run} has no evaluated SAEs; expected a run after `saebench eval --run {run}`")
    return found


def _is_copied(named: Path, own: Path | None) -> bool:
    """Whether a dictionary that a summary names is one of the run's own, which may have been copied with its run."""
    if own is None or not (named / CONFIG).exists():
        return own is not None
    return named.resolve() == own.resolve() or hash_files(weights_of(named)) == hash_files(weights_of(own))


def _prefixes(runs: Collection[Path]) -> dict[Path, str]:
    """What stands before the names of what is in each run: nothing where there is one."""
    return {run: f"{name}/" if len(runs) > 1 else "" for run, name in short_names(runs).items()}


def _names(runs: dict[Path, list[Path]]) -> list[str]:
    """Of the dictionaries of all runs: RUN/NAME where there are several, or two of one name in one; a path where that does not tell them apart."""
    before = _prefixes(runs)
    every = [(run, folder) for run, folders in runs.items() for folder in folders]
    names = [before[run] + folder.name for run, folder in every]
    for other in (lambda folder: f"{folder.resolve().parent.parent.name}/{folder.name}", relative):
        alike = {name for name in names if names.count(name) > 1}
        names = [other(folder) if name in alike else name for name, (_, folder) in zip(names, every, strict=True)]
    return names


def write_report(
    run: Path,
    folders: list[Path],
    store: Path | None = None,
    seconds: dict[str, float] | None = None,
    more: Sequence[list[list[str]]] = (),
) -> dict[str, Any]:
    """Write the run's summary and report; returns the summary. `more` are tables to be shown behind its own."""
    return _write(run, {run: folders}, store, seconds, more)


def _write(
    out: Path,
    runs: dict[Path, list[Path]],
    store: Path | None,
    seconds: dict[str, float] | None,
    more: Sequence[list[list[str]]],
) -> dict[str, Any]:
    sets: list[dict[str, Any]] = []
    for run, before in _prefixes(runs).items():
        sets += [entry | {"name": before + entry["name"]} for entry in summarise_sets(run, runs[run])]
    labels = dict(zip(_names(runs), (folder for folders in runs.values() for folder in folders), strict=True))
    found = [
        evaluated(entry | {"name": name}, folder) for name, folder in labels.items() for entry in summarise([folder])
    ]
    saes = [one.entry for one in found]
    compared = recipes(found)
    for figure in FIGURES:
        unclear = undecided(compared, figure)
        for entry in saes:
            entry.setdefault("undecided", []).extend([figure] if entry["path"] in unclear else [])
    used = sorted({str(store or recorded_store(folder)) for folder in labels.values()})
    opened = open_store(used[0])
    model = model_name(opened.folder, opened.manifest["identity"]["model"]["id"])
    earlier = read_json(out / SUMMARY).get("seconds", {}) if (out / SUMMARY).exists() else {}
    summary = {
        "model": relative(model_path(model)) if Path(model_path(model)).exists() else model,
        "store": relative(used[0]),
        "seconds": seconds if seconds is not None else earlier,
        "saes": saes,
        "least_differences": least_differences(compared),
        "over_seeds": over_seeds(compared),
        "equal_l0": at_equal_l0(found),
        **({"sets": sets} if sets else {}),
        **({"more": [table for table in more if table]} if any(more) else {}),
    }
    write_json(out / SUMMARY, summary)
    logs = {name: log for name, folder in labels.items() if (log := folder / "metrics.jsonl").exists()}
    architectures = {name: architecture_of(read_config(labels[name]))[0] for name in logs}
    write_text(out / REPORT, page(summary, {name: read_metrics(log) for name, log in logs.items()}, architectures))
    return summary
