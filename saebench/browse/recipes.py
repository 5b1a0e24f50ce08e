"""Steering settings that can be named, saved, put into a URL and written as Python."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from saebench.config import to_json
from saebench.files import read_json, write_json, writing
from saebench.index.schema import check_identity
from saebench.steer import Bench, Intervention, Sampling, interventions
from saebench.steer.interventions import Positions
from saebench.steer.turns import Turn, format_turns, parse_turns

_SCHEMA = "saebench-recipe"
_NAME = re.compile(r"[\w][\w .-]{0,59}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what is generated."""

    turns: tuple[Turn, ...] = ()
    prompt: str = ""
    positions: Positions = "all"
    n: int = 1
    max_new_tokens: int = 48
    temperature: float = 1.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def sampling(self) -> Sampling:
        """Raises ValueError for settings that make no sense."""
        return Sampling(
            max_new_tokens=self.max_new_tokens, n_samples=self.n, seed=self.seed, temperature=self.temperature,
            top_p=self.top_p, repetition_penalty=self.repetition_penalty,
        )  # fmt: skip

    def interventions(self, bench: Bench) -> list[Intervention]:
        """Raises ValueError without a latent, and as `saebench.steer.interventions` does."""
        if not self.turns:
            raise ValueError("no latent is chosen; add one, or open one from any page and steer with it")
        return interventions(bench, self.turns, self.positions)

    def python(self, sae: Path) -> str:
        """The same generation as a script."""
        return f"""from saebench.steer import Sampling, arms_of, generate, interventions, open_bench, parse_turns

bench = open_bench({str(sae)!r})
turns = parse_turns({format_turns(self.turns)!r})
arms = arms_of(interventions(bench, turns, {self.positions!r}), seed={self.seed})
sampling = Sampling(max_new_tokens={self.max_new_tokens}, n_samples={self.n}, seed={self.seed}, temperature={self.temperature},
                    top_p={self.top_p}, repetition_penalty={self.repetition_penalty})
for text in generate(bench.model, {self.prompt!r}, arms, sampling).texts:
    print(f"--- {{text.arm}}: {{text.text}}")
"""


POSITIONS: tuple[str, ...] = get_args(Positions)
MAX_TEXTS = 8
"""texts of an arm that the bench shows"""


def save_recipe(run: Path, name: str, sae: str, recipe: Recipe, of: dict[str, str]) -> Path:
    """Write `recipes/NAME.json` of a run, with the hashes of what it belongs to (`belonging_of`). Raises ValueError for a name that is no file's."""
    path = _path(run, name)
    body = {**to_json(recipe), "turns": format_turns(recipe.turns)}
    with writing(path):
        write_json(path, {"schema": _SCHEMA, "schema_version": 1, "sae": sae, "of": of, **body})
    return path


def recipes_of(run: Path, sae: str) -> list[str]:
    """Names of the recipes that were saved for an SAE of a run."""
    found = []
    for path in sorted((run / "recipes").glob("*.json")):
        try:
            if read_json(path).get("sae") == sae:
                found.append(path.stem)
        except (ValueError, AttributeError):
            continue  # load_recipe says what is wrong with it
    return found


def load_recipe(run: Path, name: str, of: Callable[[tuple[Turn, ...]], dict[str, str]]) -> tuple[Recipe, bool]:
    """(a recipe, whether it says of which SAE it is: older files do not).

    Raises ValueError for a file that is no recipe, and for one of other SAEs or indexes than `of` says of its turns, as far as both say.
    """
    path = _path(run, name)
    if not path.exists():
        raise ValueError(f"{path} is not there")
    content: Any = read_json(path)
    fields = {field.name for field in dataclasses.fields(Recipe)}
    if not isinstance(content, dict) or content.get("schema") != _SCHEMA or not fields <= set(content):
        raise ValueError(f"{path} is no recipe; delete it, or save it again")
    if not isinstance(said := content.get("of"), dict | None):
        raise ValueError(f"{path} is no recipe; delete it, or save it again")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Recipe):
        value, usual = content[field.name], "" if field.name == "turns" else field.default
        kinds = (int, float) if isinstance(usual, float) else type(usual)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise ValueError(f"{field.name} in {path} is {value!r}; expected something like {usual!r}")
        if field.name != "turns":
            values[field.name] = float(value) if isinstance(usual, float) else value
    if content["positions"] not in POSITIONS or not 1 <= content["n"] <= MAX_TEXTS:
        raise ValueError(
            f"{path} has positions {content['positions']!r} and n {content['n']}; expected {', '.join(POSITIONS)} and 1 to {MAX_TEXTS}"
        )
    recipe = Recipe(**values, turns=parse_turns(content["turns"]))
    recipe.sampling()
    if said is not None:
        both = {what: value for what, value in of(recipe.turns).items() if what in said}
        check_identity(path, said, both, f"set it anew and save it again; its latents are {content['turns']}")
    return recipe, said is not None


def _path(run: Path, name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise ValueError(f"recipe {name!r} cannot be a file; use letters, digits, spaces, dots and dashes, at most 60")
    return run / "recipes" / f"{name}.json"
