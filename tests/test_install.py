import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


def test_everything_that_installs_is_pinned() -> None:
    """What torch alone decides, by its build (CUDA libraries), is left to it: a pin of ours could only contradict it."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {canonicalize_name(name) for name in pins}
    left_to_torch = ("nvidia-", "cuda-", "setuptools")
    todo, seen = [Requirement("saebench[dev]")], set[str]()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        try:
            version(name)
        except PackageNotFoundError:
            continue
        if name.startswith(left_to_torch):
            continue
        seen.add(name)
        for line in requires(name) or ():
            inner = Requirement(line)
            extras = requirement.extras or {""}
            if canonicalize_name(inner.name) not in seen and (
                inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras)
            ):
                todo.append(inner)
    assert {"torch", "streamlit", "tree-sitter-python", "websockets"} <= seen
    assert seen - pinned == {"saebench"}


def test_transformer_lens_is_bound_to_the_version_that_was_tried() -> None:
    """`models/places.py` takes of its internals, which test_models.py tries in the pinned version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(ROOT / "constraints.txt").read_text().splitlines()[1:]]
    bound, pin = (r.specifier for line in lines if (r := Requirement(line)).name == "transformer-lens")
    major, minor, *_ = str(pin).removeprefix("==").split(".")
    assert set(map(str, bound)) == {f">={major}.{minor}", f"<{major}.{int(minor) + 1}"}
