"""What is open: an SAE, its index where there is one, and the model whose vectors both are of, held against each other once."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from saebench.evaluate.attribution import Longest, longest_at
from saebench.files import hash_files
from saebench.index import FeatureIndex, IndexConfig, open_feature_index
from saebench.index.schema import identity_of
from saebench.models import LanguageModel, choose_device, load_model
from saebench.sae import SAE, Ends, ends_of, files_of, load_sae, read_config
from saebench.sae.io import CONFIG
from saebench.steer.interventions import Intervention, Mode, check_widths
from saebench.steer.units import units_of
from saebench.store.source import Origin, check_origin, longest_of, origin_of


@dataclass(frozen=True, eq=False)
class Bench:
    """An SAE with its index, where there is one, and its model, all on one device; SAE and model are loaded when they are first asked for."""

    folder: Path
    """SAE directory"""
    index: FeatureIndex | None
    device: str
    ends: Ends
    origin: Origin | None
    """the model, as it was recorded; None where nothing says"""
    weights_hash: str
    """of the SAE, with what its configuration says"""
    belonging: dict[str, str]
    """hashes of what a figure taken here depends on: of the SAE's weights, and of the index and what that was made from"""
    load: Callable[..., LanguageModel]
    """how a model is had by its name, a revision and a device, as often as it is asked for"""
    open: "Callable[[Path], Bench]"
    """how the bench of another SAE is had by its directory, as often as it is asked for"""

    @cached_property
    def sae(self) -> SAE:
        """Raises ValueError where it cannot be loaded, or is no longer the one that was opened."""
        sae = load_sae(self.folder, device=self.device)
        if _hash(self.folder) != self.weights_hash:
            raise ValueError(f"{self.folder} was written again since it was opened: open it again")
        return sae

    @property
    def model(self) -> LanguageModel:
        """Raises ValueError where it cannot be loaded, or is not the one whose vectors SAE and index are of."""
        if self.origin is None:
            raise ValueError(f"{self.folder} does not say of which model it is (metadata.model_name in {CONFIG})")
        model = self.load(self.origin.name, revision=self.origin.revision, device=self.device)
        check_origin(model, self.origin)
        check_widths(model, self.sae, self.ends, str(self.folder))
        return model

    @property
    def key(self) -> tuple[str, ...]:
        """(SAE, index, model, device) as hashes: where they are equal, so is all that is computed here. Raises ValueError as `model` does."""
        return self.weights_hash, self.belonging.get("index", "none"), self.model.weights_hash, self.device

    @cached_property
    def longest(self) -> Longest:
        """Longer vectors are massive, and left alone: by the index, or else by what the SAE was trained on."""
        if self.index is not None:
            return self.index.longest
        return longest_at([longest_of(self.folder, hook) for hook in self.ends.reads])

    def beside(self, name: str) -> "Bench":
        """The bench of an SAE that lies in the same folder, by its name; this one for no name.

        Raises ValueError where none is called so or it cannot be opened, and for one of another model.
        """
        if name in ("", self.folder.name):
            return self
        names = [path.parent.name for path in sorted(self.folder.parent.glob(f"*/{CONFIG}"))]
        if name not in names:
            raise ValueError(f"no SAE {name!r} lies beside {self.folder}; expected one of {', '.join(names)}")
        other = self.open(self.folder.parent / name)
        ours, theirs = self.origin, other.origin
        try:
            if ours is None or theirs is None:
                raise ValueError(f"{(self if ours is None else other).folder} does not say which it is of")
            if theirs.weights is None and theirs[:2] != ours[:2]:
                raise ValueError(f"{theirs.record} names {theirs.name!r}, {ours.record} names {ours.name!r}")
            check_origin(self.model, theirs)
        except ValueError as error:
            raise ValueError(f"SAE {name!r} is not of the model of {self.folder.name!r}: {error}") from error
        return other

    def intervention(self, latent: int, strength: str | int | float = "0.5n", mode: Mode = "add") -> Intervention:
        """An intervention at a strength written `12`, `6x` or `0.5n` (see `Units`); for `scale` a plain factor."""
        raw = 0.0 if mode == "ablate" else units_of(self.sae, latent, self.index).raw(strength, mode)
        return Intervention(sae=self.sae, ends=self.ends, latent=latent, mode=mode, strength=raw, longest=self.longest)


def bench_with(
    sae: Path,
    index: FeatureIndex | None,
    device: str | None = None,
    load: Callable[..., LanguageModel] | None = None,
    open: Callable[[Path], Bench] | None = None,
    *,
    hook: str | None = None,
    model: str | None = None,
) -> Bench:
    """The bench of an SAE directory and its index, on the first device at hand unless told; nothing is loaded yet.

    `load` and `open` are for whoever shares models and benches; `hook` and `model` are given of an SAE whose files do not say. Raises ValueError for a directory that holds no SAE, and where nothing says at which hooks.
    """
    ends = index.ends if index else ends_of(sae, read_config(sae, hook=hook, model=model))
    store = index.store if index and index.has_store else None
    origin = origin_of(sae, store, index.identity.get("model") if index else None)
    if origin is None and model is not None:
        origin = Origin(model, None, None, "--model")
    belonging = identity_of(sae, None) if index is None else index.belonging
    load = load or functools.cache(load_model)
    open = open or functools.cache(lambda other: bench_with(other, _index_of(other), device, load))
    return Bench(sae, index, choose_device(device), ends, origin, _hash(sae), belonging, load, open)


def _index_of(sae: Path, index: Path | None = None, store: Path | None = None) -> FeatureIndex | None:
    """The index that is named, or the usual one where it is there."""
    path = index or IndexConfig(sae=sae).path
    return open_feature_index(path, sae=sae, store=store) if index is not None or path.exists() else None


def _hash(sae: Path) -> str:
    return hash_files(files_of(sae))


def open_bench(
    sae: Path | str,
    *,
    index: Path | None = None,
    store: Path | None = None,
    device: str | None = None,
    hook: str | None = None,
    model: str | None = None,
) -> Bench:
    """Open an SAE directory with the model it was trained on and its index (default: index/NAME.h5 beside saes/).

    Raises ValueError where one of them cannot be loaded, or the model is not the one whose vectors were indexed.
    """
    sae = Path(sae)
    bench = bench_with(sae, _index_of(sae, index, store), device, hook=hook, model=model)
    _ = bench.model
    return bench
