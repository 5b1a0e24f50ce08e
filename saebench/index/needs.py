"""What latents need beside the token they fire on, as `saebench interactions` found it: a JSON file beside the index."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from saebench.files import write_json
from saebench.index.reader import FeatureIndex
from saebench.index.ruled import Rule
from saebench.index.schema import read_beside

_HEADER = {"schema": "saebench-interactions", "schema_version": 1}
ORDERS = ("alone", "one token", "two", "three and more")
"""what strength is shared among: what is left with all masked, and sets of so many tokens"""


class Set(NamedTuple):
    """Tokens that count together at several examples."""

    text: str
    """in words; `or` between those of which any is enough"""
    strength: float
    """mean over its examples, as a share of the activation there; below 0 where the latent is weaker with it"""
    examples: int
    """how many it is a set of"""


class Needs(NamedTuple):
    """What a latent needs."""

    examples: int
    """explained; 0 where there is nothing to explain"""
    misses: int
    """tokens explained on which it is silent though it often fires on them"""
    by_order: tuple[float, ...]
    """strength by ORDERS, as shares of all; none without examples"""
    share: float
    """of the strength of all salient sets that of sets which several examples have; NaN where there are none"""
    sets: tuple[Set, ...]
    """those that say most"""
    rule: Rule | None
    """made of them and scored as rules are; None where there is none"""

    @property
    def contextuality(self) -> float:
        """Share of its strength that several tokens make together; NaN without examples."""
        return sum(self.by_order[2:]) if self.by_order else math.nan


class Needed(NamedTuple):
    """All that a file holds."""

    settings: dict[str, Any]
    latents: dict[int, Needs]


def needs_path(index: Path) -> Path:
    """`<sae>.interactions.json` beside the index."""
    return index.with_suffix(".interactions.json")


def read_needs(index: FeatureIndex) -> dict[int, Needs]:
    """Needs by latent, none where there is no file. Raises ValueError as `read_needed`."""
    found = read_needed(index)
    return {} if found is None else found.latents


def read_needed(index: FeatureIndex) -> Needed | None:
    """The file beside an index. Raises ValueError where it is none of interactions, or of another SAE or index than this."""

    def needed(content: Any) -> Needed:
        return Needed(content["settings"], {int(key): _needs(value) for key, value in content["latents"].items()})

    path, again = needs_path(index.path), "run `saebench interactions` again"
    return read_beside(path, _HEADER, "interactions", index.belonging, again, needed)


def write_needed(index: FeatureIndex, found: Needed) -> None:
    """Write the file beside the index, whole."""
    latents = {str(latent): _plain(needs) for latent, needs in sorted(found.latents.items())}
    write_json(
        needs_path(index.path), _HEADER | {"of": index.belonging, "settings": found.settings, "latents": latents}
    )


def _plain(needs: Needs) -> dict[str, Any]:
    rule = None if needs.rule is None else {name: _known(value) for name, value in needs.rule._asdict().items()}
    sets = [one._asdict() for one in needs.sets]
    return needs._asdict() | {"sets": sets, "rule": rule, "share": _known(needs.share)}


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _needs(value: dict[str, Any]) -> Needs:
    rule = value["rule"]
    figures: dict[str, Any] = {name: math.nan if part is None else part for name, part in (rule or {}).items()}
    return Needs(
        **value
        | {
            "by_order": tuple(value["by_order"]),
            "share": math.nan if value["share"] is None else value["share"],
            "sets": tuple(Set(**one) for one in value["sets"]),
            "rule": None if rule is None else Rule(**figures),
        }
    )
