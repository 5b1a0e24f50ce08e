import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


def test_everything_that_installs_is_pinned() -> None:
    """Every line of `pip freeze` after a fresh install stands in constraints.txt.

    What torch alone decides is left to it: its own build, and the CUDA libraries of that build. What else lies in the environment is not
    looked at.
    """
    pins = {line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")}
    pinned = {canonicalize_name(name): pin for name, pin in (line.split("==") for line in pins)}
    todo, installed = [Requirement("saebench[dev]")], dict[str, str]()
    tried = set[tuple[str, frozenset[str]]]()
    while todo:
        requirement = todo.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in tried or name.startswith(("nvidia-", "cuda-")):
            continue
        tried.add((name, extras))
        try:
            installed[name] = version(name).split("+")[0]
        except PackageNotFoundError:
            continue
        inner = (Requirement(line) for line in requires(name) or ())
        todo += [r for r in inner if not r.marker or any(r.marker.evaluate({"extra": e}) for e in extras | {""})]
    assert {"torch", "streamlit", "tree-sitter-python", "websockets", "setuptools"} <= set(installed)
    del installed["saebench"]
    assert installed == {name: pinned.get(name) for name in installed}


def test_transformer_lens_is_bound_to_the_version_that_was_tried() -> None:
    """`models/places.py` takes of its internals, which test_models.py tries in the pinned version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(ROOT / "constraints.txt").read_text().splitlines()[1:]]
    bound, pin = (r.specifier for line in lines if (r := Requirement(line)).name == "transformer-lens")
    major, minor, *_ = str(pin).removeprefix("==").split(".")
    assert set(map(str, bound)) == {f">={major}.{minor}", f"<{major}.{int(minor) + 1}"}
