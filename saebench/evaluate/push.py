"""An SAE to the hub, with a card made from its evaluation."""

import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saebench.evaluate.evaluate import EVALUATION
from saebench.evaluate.tables import COLUMNS
from saebench.files import first_line, read_json, write_json, write_text
from saebench.models import model_path
from saebench.sae import ends_of, load_sae, read_config
from saebench.sae.formats import CONFIG, WEIGHTS
from saebench.sae.hub import Remote, parse
from saebench.sae.io import kind_of
from saebench.view.markdown import plain

log = logging.getLogger(__name__)
CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Which SAE to publish, and where."""

    sae: Path
    """SAE directory, evaluated"""
    to: str
    """hf:OWNER/REPO or hf:OWNER/REPO/FOLDER"""
    model: str | None = None
    """name by which others find its model, where it was recorded as a folder of this machine"""
    private: bool = False
    """make the repository private, where it is not there yet"""
    dry_run: Path | None = None
    """folder to write into what would be pushed, and push nothing"""


def push(config: PushConfig) -> str:
    """Publish an SAE; returns where it is, pinned to its commit, or the folder of a dry run.

    Raises ValueError for an SAE that was not evaluated, and where the hub does not take it.
    """
    remote = parse(config.to)
    if remote.revision is not None:
        raise ValueError(
            f"{config.to!r} names a revision; expected hf:OWNER/REPO or hf:OWNER/REPO/FOLDER, whose main branch gets it"
        )
    if not (config.sae / WEIGHTS).exists():
        raise ValueError(
            f"{config.sae} holds no SAE as saebench writes it (no {WEIGHTS}); expected a folder of RUN/saes"
        )
    if not (config.sae / EVALUATION).exists():
        raise ValueError(f"{config.sae} was not evaluated, and its card would be empty: `saebench eval` comes first")
    if config.dry_run is not None:
        _write(config, remote, config.dry_run)
        return str(config.dry_run)
    with tempfile.TemporaryDirectory() as folder:
        _write(config, remote, Path(folder))
        return _upload(Path(folder), remote, config.private)


def _upload(folder: Path, remote: Remote, private: bool) -> str:
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(remote.repo, private=private, exist_ok=True)
        made = HfApi().upload_folder(
            repo_id=remote.repo,
            folder_path=folder,
            path_in_repo=remote.folder,
            commit_message=f"{remote.name}, by saebench",
        )
    except Exception as error:  # whatever stands between here and the hub
        raise ValueError(
            f"{remote} cannot be pushed ({first_line(error)}): `hf auth login` with a token that may write to {remote.repo}; "
            "--dry-run writes what would be pushed"
        ) from error
    return str(remote._replace(revision=made.oid))


def _write(config: PushConfig, remote: Remote, folder: Path) -> None:
    """What is pushed: configuration, weights, evaluation and card. Nothing in it says where files lie on this machine."""
    said = read_config(config.sae)
    metadata = said["metadata"] | {"model_name": _model(config, said["metadata"])}
    if data := metadata.get("dataset_path"):
        metadata["dataset_path"] = _public(data)
    if "saebench" in metadata:
        metadata["saebench"] = {name: value for name, value in metadata["saebench"].items() if name != "store"}
    if not metadata.get("source", {}).get("path", "hf:").startswith("hf:"):
        del metadata["source"]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, said | {"metadata": metadata})
    shutil.copyfile(config.sae / WEIGHTS, folder / WEIGHTS)
    evaluation = read_json(config.sae / EVALUATION)
    write_json(folder / EVALUATION, {name: value for name, value in evaluation.items() if name != "store"})
    write_text(folder / CARD, card(config.sae, said | {"metadata": metadata}, remote))


def _model(config: PushConfig, metadata: dict[str, Any]) -> str | None:
    name = config.model or metadata.get("model_name")
    if name and config.model is None and Path(model_path(name)).is_absolute():
        log.warning("model %r is a folder of this machine: give the name by which others find it with --model", name)
        return _public(name)
    return name


def _public(path: str) -> str:
    """A path on this machine by its last part alone; a name as it is."""
    return Path(path).name if Path(path).is_absolute() or path.startswith((".", "~")) else path


def card(folder: Path, config: dict[str, Any], remote: Remote) -> str:
    """The model card of an evaluated SAE, in Markdown."""
    evaluation, metadata = read_json(folder / EVALUATION), config["metadata"]
    metrics, intervals = evaluation["metrics"] | evaluation["baselines"], evaluation["intervals"]
    ends, model = ends_of(folder, config), metadata.get("model_name") or "an unnamed model"
    kind = kind_of(load_sae(folder)).replace("_", " ") or "sparse autoencoder"
    architecture = metadata.get("training_architecture") or config["architecture"]
    rows = [
        f"| {label} | {_figure(metrics[name], form)} | {_interval(intervals.get(name), form)} |"
        for name, (label, form) in COLUMNS.items()
        if isinstance(metrics.get(name), int | float)
    ]
    reads, writes = (", ".join(f"`{hook}`" for hook in hooks) for hooks in ends)
    data = metadata.get("dataset_path")
    trained = metadata.get("saebench", {}).get("tokens_trained")
    return "\n".join([
        "---",
        "library_name: saelens",
        "tags: [sparse-autoencoder, saebench]",
        *([f"base_model: {model}"] if "/" in model else []),
        "---",
        f"# {plain(remote.name)}",
        "",
        f"A {kind} ({architecture}, {config['d_sae']:,} latents) of {plain(model)}: it reads {reads}"
        + ("" if ends.tied else f" and writes {writes}") + ".",
        "",
        f"- Data: {plain(data) if data else 'not recorded'}, contexts of {metadata.get('context_size', '?')} tokens"
        + (f"; trained on {trained:,} rows" if trained else ""),
        f"- Evaluated on {metrics['n_tokens_eval']:,} held-out tokens: {evaluation['mask']}",
        "",
        f"| figure | | {evaluation['interval_method']} |",
        "|---|---:|---|",
        *rows,
        "",
        "What each is: docs/evaluate.md of saebench. To check, evaluate, index and browse it on your own text:",
        "",
        f"    saebench run {model} --dataset YOUR_TEXT --sae {remote}",
        "",
        "or from Python:",
        "",
        "    from saebench.sae import load_sae",
        "    from saebench.sae.hub import local",
        f'    sae = load_sae(local("{remote}"))',
        "",
    ])  # fmt: skip


def _figure(value: float, form: str) -> str:
    return format(value, form)


def _interval(interval: list[float | None] | None, form: str) -> str:
    if interval is None or None in interval:
        return ""
    return " to ".join(_figure(end, form) for end in interval if end is not None)
