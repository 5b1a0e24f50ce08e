"""SAEs by name: on the Hugging Face hub, as `hf:OWNER/REPO[@REVISION][/FOLDER]`, or as SAELens names releases, `RELEASE//ID`.

What is named is fetched once, at one commit, and kept in a run's `saes/` in the layout of our own, where figures and indexes can lie
beside it; the hub's cache holds the files as they came. `metadata.source` says which they are.
"""

import difflib
import importlib.util
import logging
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple

from saebench.files import first_line, hash_files
from saebench.sae.formats import CONFIG, with_said
from saebench.sae.io import load_sae, read_config, save_sae, weights_of

log = logging.getLogger(__name__)
_WEIGHTS = (".safetensors", ".npz", ".pt", ".pth")
_BESIDE = (".json", ".yaml", ".yml")
_NO_SAE = ("sparsity.safetensors",)  # how often latents fire, beside SAELens' weights
_ENCODER, _DECODER = "W_enc_", "W_dec_"  # two files of a layer of circuit-tracer's cross-layer transcoders
_FINAL = "checkpoints/final.safetensors"  # of Llama Scope, under the folder that is the SAE
_LABELS = (
    "model_name",
    "hook_name",
    "dataset_path",
)  # of a configuration: they change what is said of an SAE, not what it does
_LISTED = 20


class Source(str):
    """An SAE as the command line names it, before it is looked for."""


SaePath = Annotated[Path, Source]
"""A directory, or on the command line anything that `local` takes."""


class Remote(NamedTuple):
    """An SAE on the hub."""

    repo: str
    revision: str | None = None
    folder: str = ""
    """in the repository, or a file of weights there"""
    known: dict[str, Any] = {}  # noqa: RUF012 - never changed
    """what SAELens' list says of it, for metadata that has nothing else"""
    said: dict[str, Any] = {}  # noqa: RUF012
    """entries of its configuration that the list corrects"""

    def __str__(self) -> str:
        return f"hf:{self.repo}{f'@{self.revision}' if self.revision else ''}{f'/{self.folder}' if self.folder else ''}"

    @property
    def name(self) -> str:
        """Of its directory here."""
        return re.sub(r"\.(safetensors|npz|pth?)$", "", self.folder).replace("/", "-") or self.repo.split("/")[1]


def local(source: Path | str, run: Path | None = None) -> Path:
    """The directory of an SAE: one on this machine as it is, another fetched into `RUN/saes` (default: `runs/REPO`) unless it is there.

    Raises ValueError where the hub cannot be reached or has no such SAE, and where the name fits several, which are listed.
    """
    text = str(source)
    if text.startswith("hf:"):
        remote = parse(text)
    elif "//" in text.lstrip("/") and not Path(text).exists():
        remote = released(text)
    else:
        return Path(text).expanduser()
    return _fetched(remote, run or Path("runs") / remote.repo.split("/")[1])


def parse(text: str) -> Remote:
    """`hf:OWNER/REPO[@REVISION][/FOLDER]`. Raises ValueError for anything else."""
    found = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.*?))?/?", text)
    if found is None or ".." in PurePosixPath(found[3] or "").parts:
        raise ValueError(
            f"{text!r} names nothing on the hub; expected hf:OWNER/REPO, hf:OWNER/REPO/FOLDER or hf:OWNER/REPO@REVISION/FOLDER"
        )
    return Remote(found[1], found[2], found[3] or "")


def _fetched(remote: Remote, run: Path) -> Path:
    """The SAE's directory in a run; what is there already is taken for it unless the name asks for another revision."""
    target = run / "saes" / remote.name
    found = _source(target)
    if found is not None and remote.revision is None and _without_commit(found) == str(remote):
        log.info("%s is %s, fetched before", target, found)
        return target
    folder, commit, of = _download(remote)
    source = str(remote._replace(revision=commit, folder=of))
    target = run / "saes" / remote._replace(folder=of).name
    if (target / CONFIG).exists():
        if (found := _source(target)) != source:
            raise ValueError(f"{target} holds {found or 'another SAE'}, not {source}: delete it, or move it elsewhere")
        return target
    log.info("%s → %s", source, target)
    metadata = with_said(read_config(folder), remote.said)["metadata"]
    said = {"source": {"path": source, "weights": hash_files(weights_of(folder))}}
    save_sae(load_sae(folder, said=remote.said), target, remote.known | metadata | said)
    return target


def _source(folder: Path) -> str | None:
    """What a directory was fetched from, as far as it is there."""
    if not (folder / CONFIG).exists():
        return None
    return read_config(folder)["metadata"].get("source", {}).get("path")


def _without_commit(source: str) -> str:
    return re.sub(r"@[^/]+", "", source, count=1)


# ------------------------------------------------------------------------------------------ the hub


def _download(remote: Remote) -> tuple[Path, str, str]:
    """(folder or file of weights in the hub's cache, commit, its path in the repository), of the only SAE that the name fits."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().model_info(remote.repo, revision=remote.revision)
        of, wanted = _the_one([file.rfilename for file in info.siblings or ()], remote)
        root = Path(snapshot_download(remote.repo, revision=remote.revision, allow_patterns=wanted))
    except GatedRepoError as error:
        raise ValueError(
            f"{remote.repo} is gated: accept its terms at https://huggingface.co/{remote.repo}, then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(
            f"{remote.repo} has no revision {remote.revision!r}; expected a branch, a tag or a commit"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"the hub has no repository {remote.repo}, or shows it to its members alone: look at the name, or `hf auth login`"
        ) from error
    except _NotOne:
        raise
    except Exception as error:  # whatever stands between here and the hub
        root = _cached(remote, error)
        files = [str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()]
        try:
            of, _ = _the_one(files, remote)
        except _NotOne as missing:
            raise ValueError(f"{missing} in the hub's cache, and {_unreachable(remote, error)}") from error
    return root / of, root.name, of


def _cached(remote: Remote, error: Exception) -> Path:
    """What the hub's cache has of a repository. Raises ValueError where it has nothing."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(remote.repo, revision=remote.revision, allow_patterns="", local_files_only=True))
    except Exception:  # nothing of it
        raise ValueError(f"{remote} is not in the hub's cache, and {_unreachable(remote, error)}") from error


def _unreachable(remote: Remote, error: Exception) -> str:
    revision = f" --revision {remote.revision}" if remote.revision else ""
    include = f" --include '{remote.folder}/*'" if remote.folder else ""
    return (
        f"the hub cannot be reached ({first_line(error)}). Where there is a network: "
        f"`hf download {remote.repo}{revision}{include}`; HF_HUB_CACHE says where it lies"
    )


class _NotOne(ValueError):
    """A name that fits no SAE, or several."""


def _the_one(files: Sequence[str], remote: Remote) -> tuple[str, list[str]]:
    """(the SAE that a name fits, the files that it is made of). Raises ValueError, with what there is, where it is not one."""
    there = _saes(files)
    name = remote.folder
    below = [of for of, made in there.items() if not name or name in (of, made[0]) or of.startswith(f"{name}/")]
    if name in below:
        below = [name]
    if len(below) != 1:
        shown = (below or list(there))[:_LISTED]
        more = len(below or there) - len(shown)
        listing = "".join(f"\n  hf:{remote.repo}/{of}" for of in shown) + (f"\n  and {more} more" if more else "")
        what = f"has {len(below)} SAEs" if below else "is no SAE; the repository has " + ("these" if there else "none")
        raise _NotOne(f"{remote} {what}{': name one' if below else ''}{listing}")
    return below[0], there[below[0]]


def _saes(files: Sequence[str]) -> dict[str, list[str]]:
    """Folder, or file of weights where a folder has several -> the files that the SAE is made of."""
    weights: dict[str, list[str]] = {}
    for file in sorted(files):
        path = PurePosixPath(file)
        if path.suffix in _WEIGHTS and path.name not in _NO_SAE and not path.name.startswith(_DECODER):
            parent = path.parent.parent if file.endswith(_FINAL) else path.parent
            weights.setdefault("" if str(parent) == "." else str(parent), []).append(file)
    found: dict[str, list[str]] = {}
    for folder, there in weights.items():
        beside = [
            file
            for file in files
            if PurePosixPath(file).suffix in _BESIDE and str(PurePosixPath(file).parent) == (folder or ".")
        ]
        for file in there:
            other = file.replace(_ENCODER, _DECODER)
            decoder = [other] if other != file and other in files else []
            found[folder if len(there) == 1 else file] = [file, *decoder, *beside]
    return found


# ------------------------------------------------------------------------------------ SAELens' names


def released(text: str) -> Remote:
    """`RELEASE//ID` by SAELens' own list. Raises ValueError where that is not here, or does not have it."""
    import yaml

    release, _, name = text.partition("//")
    spec = importlib.util.find_spec("sae_lens")
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent / "pretrained_saes.yaml"
    if path is None or not path.exists():
        raise ValueError(
            f"{text!r} is a release by SAELens' list, which comes with its package: `pip install --no-deps sae-lens`, "
            "or name the repository, hf:OWNER/REPO/FOLDER"
        )
    releases = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if release not in releases:
        raise ValueError(f"SAELens has no release {release!r}{_near(release, releases)}")
    told = releases[release]
    saes = {str(sae["id"]): sae for sae in told["saes"]}
    if name not in saes:
        raise ValueError(f"release {release!r} has no SAE {name!r}{_near(name, saes)}")
    one = saes[name]
    said = dict(told.get("config_overrides") or {})
    said |= {key: one[key] for key in ("norm_scaling_factor",) if key in one}
    known = {"model_name": told["model"]} | ({"stated_l0": one["l0"]} if one.get("l0") else {})
    return Remote(told["repo_id"], None, str(one["path"]), known, said)


def _near(name: str, names: Any) -> str:
    """What a name may have been meant for."""
    near = difflib.get_close_matches(name, names, 5, 0.3) or list(names)[:5]
    return f"; near it: {', '.join(near)}"
