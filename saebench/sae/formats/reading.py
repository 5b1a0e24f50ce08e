"""What the readers of all formats need: weights without pickle, names of hooks and models, and fields that are none of theirs."""

import re
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]


class Read(NamedTuple):
    """A dictionary as SAELens 6 would have written it, whatever did."""

    config: Config
    """what `cfg.json` would say"""
    tensors: Callable[[], Tensors]
    """reads the weights: W_enc [D, F], b_enc, W_dec [F, E], b_dec, and what its architecture has besides"""


def beside(weights: str, *others: str, without: str = "") -> Callable[[Path], Path | None]:
    """What finds a format's file of weights in a folder that has these files, or by its own path; none where there is `without`."""

    def find(path: Path) -> Path | None:
        parts = Path(weights).parts
        folder = path.parents[len(parts) - 1] if path.is_file() and path.parts[-len(parts) :] == parts else path
        there = all((folder / name).is_file() for name in (weights, *others))
        return folder / weights if there and not (without and (folder / without).exists()) else None

    return find


def holding(*names: str) -> Callable[[Path], Path | None]:
    """What finds a file written by torch.save that has tensors of these names, by its own path or as the only one of a folder."""

    def find(path: Path) -> Path | None:
        files = (
            [path] if path.is_file() else sorted(file for file in path.glob("*.pt*") if file.suffix in (".pt", ".pth"))
        )
        found = [file for file in files if file.suffix in (".pt", ".pth") and set(names) <= set(load_tensors(file))]
        if len(found) > 1:
            raise ValueError(
                f"{path} holds several SAEs; give the path of one: {', '.join(file.name for file in found)}"
            )
        return found[0] if found else None

    return find


def load_tensors(file: Path) -> dict[str, Any]:
    """What a `.safetensors`, `.npz`, `.pt` or `.pth` holds, by name. Raises ValueError where it cannot be read, or not without running code in it."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as opened:
                return {name: torch.from_numpy(opened[name]) for name in opened}
        # A mapped file is read where it is looked at. Files of before PyTorch 1.6 are no zip and cannot be.
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise ValueError(
                f"{file} does not hold the weights of this SAE: it is no file of torch.save, or a damaged one"
            ) from error
        raise ValueError(
            f"{file} holds a {named[1]}, and needs more than weights to be read (torch.load with weights_only=True refuses it), "
            "which might run code: have it written again as a plain dictionary of tensors"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} does not hold the weights of this SAE: {error}") from error
    if not isinstance(held, dict):
        raise ValueError(f"{file} holds a {type(held).__name__}; expected tensors by their names")
    return held


def shapes_of(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a file, by name, without reading them."""
    if file.suffix == ".npz":
        try:
            with zipfile.ZipFile(file) as archive:
                return {name.removesuffix(".npy"): _shape(archive, name) for name in archive.namelist()}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{file} does not hold the weights of this SAE: {error}") from error
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt") as opened:
                return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} does not hold the weights of this SAE: {error}") from error
    return {name: tuple(value.shape) for name, value in load_tensors(file).items() if isinstance(value, torch.Tensor)}


def _shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(file)[0]


def shape_of(file: Path, name: str) -> tuple[int, int]:
    """The shape of a matrix in a file. Raises ValueError where it has none of that name."""
    shapes = shapes_of(file)
    if len(shapes.get(name, ())) != 2:
        raise ValueError(
            f"{file} has no matrix {name!r}; it has {', '.join(f'{each} {list(shape)}' for each, shape in shapes.items())}"
        )
    return shapes[name]  # type: ignore[return-value]


def check_names(file: Path, held: Collection[str], needed: Collection[str], known: Collection[str] = ()) -> None:
    """Raises ValueError for tensors that are not there, and for those that nothing here knows."""
    if lacking := sorted(set(needed) - set(held)):
        raise ValueError(f"{file} lacks {', '.join(lacking)}; it does not hold the weights of this SAE")
    if more := sorted(set(held) - set(needed) - set(known)):
        raise ValueError(
            f"{file} holds {', '.join(more)}, too, which is not known here; an SAE without it would be another"
        )


def check_fields(source: Path, said: Config, used: Collection[str], known: Collection[str]) -> None:
    """Raises ValueError for the first field that says something and is neither used nor known to change nothing."""
    for name, value in said.items():
        if name not in used and name not in known and value not in (None, False, "", (), [], {}):
            raise ValueError(
                f"{source} says {name}: {value!r}, which is not known here and may change what the SAE is; "
                f"if it changes nothing, take it out of a copy of the file"
            )


def expect(source: Path, said: Config, field: str, *allowed: Any) -> Any:
    """A field's value, of which the first is what it is where nothing is said. Raises ValueError where it is none of those allowed."""
    value = said.get(field, allowed[0])
    if value not in allowed:
        raise ValueError(
            f"{source} says {field}: {value!r}; an SAE can be read where it is {' or '.join(map(repr, allowed))}"
        )
    return value


def needed(source: Path, said: Config, *fields: str) -> list[Any]:
    """The values of fields. Raises ValueError naming those that are not there."""
    if lacking := [name for name in fields if said.get(name) is None]:
        raise ValueError(f"{source} lacks {', '.join(lacking)}; it is not the configuration of an SAE")
    return [said[name] for name in fields]


def in_path(file: Path, pattern: str) -> re.Match[str] | None:
    """Where the last of a pattern stands in the whole path of a file, links not followed: in a hub's cache the repository is in it, too."""
    return max(re.finditer(pattern, file.absolute().as_posix()), key=lambda match: match.start(), default=None)


def configuration(
    architecture: str,
    shape: tuple[int, int],
    read: str | None,
    written: str | None = None,
    *,
    d_out: int | None = None,
    pre_bias: bool = False,
    metadata: Config | None = None,
    **more: Any,
) -> Config:
    """What `cfg.json` would say of a dictionary of W_enc's shape that reads a hook and, where it has a `d_out`, writes another."""
    said = {"hook_name": read, "hook_name_out": written, **(metadata or {})}
    config = {"architecture": architecture, "d_in": shape[0], "d_sae": shape[1], "apply_b_dec_to_input": pre_bias}
    if d_out is not None:
        config["d_out"] = d_out
    return config | more | {"metadata": {name: value for name, value in said.items() if value is not None}}


def unit_rows(made: Tensors) -> Tensors:
    """Weights of the same reconstruction with decoder rows of norm 1: activations are lengths along them. A threshold stays as it is."""
    norms = made["W_dec"].norm(dim=1)
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    return made | {
        "W_enc": made["W_enc"] * norms,
        "b_enc": made["b_enc"] * norms,
        "W_dec": made["W_dec"] / norms[:, None],
    }
