"""What is on disk: runs, their SAEs, and how far each has come."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from saebench.evaluate.diffing import is_of_two_models
from saebench.evaluate.evaluate import EVALUATION
from saebench.evaluate.report import architecture_of, summarise
from saebench.evaluate.sets import SETS
from saebench.index import IndexConfig
from saebench.index.schema import open_index
from saebench.runlog import read_metrics
from saebench.sae import Ends, ends_of, read_config
from saebench.steer.scores import are_complete
from saebench.store.source import recorded_store


@dataclass(frozen=True)
class Trained:
    """An SAE of a run. What is on disk is looked at when it is asked for, once."""

    run: Path
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def index_path(self) -> Path:
        return IndexConfig(sae=self.folder).path

    @cached_property
    def config(self) -> dict[str, Any]:
        """`cfg.json`. Raises ValueError where it cannot be read."""
        return read_config(self.folder)

    @cached_property
    def metadata(self) -> dict[str, Any]:
        return self.config.get("metadata", {})

    @cached_property
    def ends(self) -> Ends:
        """The hooks that it reads and writes. Raises ValueError where `cfg.json` does not say."""
        return ends_of(self.folder, self.config)

    @property
    def of_two_models(self) -> bool:
        """Whether it is a crosscoder of a base and a tuned model."""
        return is_of_two_models(ends_of(self.folder, self.config))

    @property
    def store(self) -> Path | None:
        """The store it was trained on, whether or not it is still there."""
        return recorded_store(self.folder)

    @cached_property
    def figures(self) -> dict[str, Any]:
        """Its entry in `summary.json`, as far as it was evaluated."""
        if (self.folder / EVALUATION).exists():
            return summarise([self.folder])[0]
        config = self.config
        architecture, kind = architecture_of(config)
        known = {"name": self.name, "architecture": architecture, "kind": kind, "hook": str(self.ends)}
        return known | {"d_in": config["d_in"], "d_sae": config["d_sae"]}

    @property
    def evaluated(self) -> bool:
        return "fvu" in self.figures

    @property
    def in_a_sum(self) -> bool:
        """Whether it has no figures of its own, but those of the set that it belongs to."""
        return bool(self.metadata.get("joint"))

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """Lines of the training log; none for an SAE that others trained."""
        path = self.folder / "metrics.jsonl"
        return read_metrics(path) if path.exists() else []

    @cached_property
    def _index(self) -> tuple[float, str | None]:
        if not self.index_path.exists():
            return 0.0, None
        try:
            with open_index(self.index_path) as file:
                return 1.0 if file.attrs["complete"] else min(0.999, float(file.attrs["share_done"])), None
        except (ValueError, KeyError, OSError) as error:
            return 0.0, f"{self.index_path} cannot be read ({error}): delete it and index again"

    @property
    def share_indexed(self) -> float:
        """0 without an index that can be read, 1 with a whole one, between them while it is built."""
        return self._index[0]

    @property
    def index_error(self) -> str | None:
        """What is wrong with the index file, where it cannot be read."""
        return self._index[1]

    def python(self, latent: int) -> str:
        """How to get at all that the page of a latent shows, from Python."""
        return f"""from saebench.index import open_feature_index
from saebench.index.examples import show
from saebench.sae import load_sae

sae = load_sae({str(self.folder)!r})
index = open_feature_index({str(self.index_path)!r})
latent = index[{latent}]
for context, values in show(index, sae, {latent}, latent.top):
    print("".join(context.pieces), values.max())
"""

    @property
    def index_command(self) -> list[str]:
        """Arguments of `saebench` that make its index, or go on with it."""
        return ["index", "--sae", str(self.folder)]

    @property
    def _set_evaluated(self) -> bool:
        return (self.run / SETS / self.metadata["set"] / EVALUATION).exists()

    def next_commands(self) -> dict[str, list[str]]:
        """What is missing, and the arguments of `saebench` that make it."""
        missing: dict[str, list[str]] = {}
        if not (self._set_evaluated if self.in_a_sum else self.evaluated or self.of_two_models):
            missing["Evaluate"] = ["eval", "--run", str(self.run)]
        if self.share_indexed < 1:
            missing["Index" if self.share_indexed == 0 else "Go on indexing"] = self.index_command
        elif not are_complete(self.index_path):
            missing["Score for steering"] = ["steer", "rank", "--sae", str(self.folder)]
        return missing


def runs_under(root: Path) -> dict[str, Path]:
    """Runs by name: `root` itself where it holds SAEs, else the folders in it that do."""
    if (root / "saes").is_dir():
        return {root.name: root}
    if not root.is_dir():
        return {}
    return {folder.name: folder for folder in sorted(root.iterdir()) if (folder / "saes").is_dir()}


def saes_of(run: Path) -> tuple[dict[str, Trained], dict[str, str]]:
    """(a run's SAEs by name, and what is wrong with those that cannot be read)."""
    found: dict[str, Trained] = {}
    broken: dict[str, str] = {}
    for folder in sorted((run / "saes").iterdir()):
        if not (folder / "cfg.json").exists():
            continue
        sae = Trained(run, folder)
        try:
            _ = sae.figures["architecture"], sae.ends, sae.share_indexed
            found[folder.name] = sae
        except (ValueError, OSError) as error:
            broken[folder.name] = str(error)
        except (KeyError, TypeError, AttributeError) as error:  # JSON, but not what an SAE's files hold
            broken[folder.name] = (
                f"cfg.json or {EVALUATION} in {folder} is not as saebench writes it ({type(error).__name__}: {error}); "
                f"restore it, or delete {EVALUATION} and evaluate again"
            )
    return found, broken
