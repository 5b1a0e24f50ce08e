"""What a judge says that latents fire on, and how well one can tell by it where they do: a JSON file beside the index."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from saebench.files import read_json, write_json
from saebench.index.reader import FeatureIndex
from saebench.index.schema import read_beside

_HEADER = {"schema": "saebench-explanations", "schema_version": 1}
JUDGE = "saebench-judge"
FEWEST = 5
"""usable answers of either kind below which there is no score"""


class Tally(NamedTuple):
    """Windows told apart by yes or no: of each kind how many there were with a usable answer, and how many were told right."""

    active: int = 0
    """in which the latent fires; of fuzzing those whose firing tokens are marked"""
    active_right: int = 0
    hard: int = 0
    """in which it is silent in spite of a token on which it often fires; of fuzzing those with other tokens marked"""
    hard_right: int = 0
    random: int = 0
    """in which it is silent, without such a token"""
    random_right: int = 0
    unusable: int = 0
    """answers that say neither yes nor no; they count nowhere else"""

    @property
    def asked(self) -> int:
        return self.active + self.hard + self.random + self.unusable

    @property
    def score(self) -> float | None:
        """Balanced accuracy: the mean of the shares told right of active and of silent windows. Chance is 0.5; None of too few."""
        silent = self.hard + self.random
        if min(self.active, silent) < FEWEST:
            return None
        return (self.active_right / self.active + (self.hard_right + self.random_right) / silent) / 2


Halves = tuple[Tally, Tally]
"""of each half of the held-out documents: by the first names are chosen, of the second are the figures shown"""


class Explanation(NamedTuple):
    """What is said of one latent, and its scores; None for what was not tried."""

    text: str
    """empty where the judge gave none that is usable"""
    method: str
    """JUDGE, or the method that a file it was taken from names"""
    detection: Halves | None = None
    """telling windows in which the latent fires by the text"""
    fuzzing: Halves | None = None
    """telling windows whose firing tokens are marked from those with others marked"""
    other_explanation: Halves | None = None
    """control: detection in the same windows by the text of latent `partners[0]`"""
    other_windows: Halves | None = None
    """control: detection by this text in the windows of latent `partners[1]`"""
    partners: tuple[int, int] | None = None
    rule: Halves | None = None
    """detection in the same windows by the latent's rule"""
    tokens: Halves | None = None
    """and by its token list"""


class Explained(NamedTuple):
    """All that a file holds."""

    judge: dict[str, str] | None
    """who scored; None for texts that nobody has"""
    settings: dict[str, Any]
    latents: dict[int, Explanation]


def explanations_path(index: Path) -> Path:
    """`<sae>.explanations.json` beside the index."""
    return index.with_suffix(".explanations.json")


def read_explanations(index: FeatureIndex) -> dict[int, Explanation]:
    """Explanations by latent, none where there is no file. Raises ValueError as `read_explained`."""
    found = read_explained(index)
    return {} if found is None else found.latents


def read_explained(index: FeatureIndex) -> Explained | None:
    """The file beside an index. Raises ValueError where it is none of explanations, or of another SAE or index than this."""

    def explained(content: Any) -> Explained:
        latents = {int(key): _explanation(value) for key, value in content["latents"].items()}
        return Explained(content["judge"], content["settings"], latents)

    path = explanations_path(index.path)
    return read_beside(path, _HEADER, "explanations", index.belonging, "explain again", explained)


def write_explained(index: FeatureIndex, found: Explained) -> None:
    """Write the file beside the index, whole."""
    latents = {str(latent): _plain(explanation) for latent, explanation in sorted(found.latents.items())}
    content = _HEADER | {"of": index.belonging, "judge": found.judge, "settings": found.settings, "latents": latents}
    write_json(explanations_path(index.path), content)


def read_neuronpedia(files: Iterable[Path], model_id: str, source: str, d_sae: int) -> dict[int, list[tuple[str, str]]]:
    """(text, method) of the explanations of each latent, of upload bodies as `export` writes them for Neuronpedia.

    Raises ValueError for a file that is none, or of another model or SAE, and for a latent that there is not.
    """
    found: dict[int, list[tuple[str, str]]] = {}
    for path in files:
        body = read_json(path)
        try:
            named = (body["modelId"], body["source"])
            said = [
                (int(feature["index"]), str(each["text"]).strip(), str(each.get("methodName") or "unnamed"))
                for feature in body["features"]
                for each in feature.get("explanations", ())
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path} is no upload body of Neuronpedia ({type(error).__name__}: {error}); expected modelId, source and features"
            ) from error
        if named != (model_id, source):
            raise ValueError(
                f"{path} is of source {named[1]!r} of model {named[0]!r}, this SAE is {source!r} of {model_id!r} there; "
                "take its own file, or name what is meant with --source and --model-id"
            )
        for latent, text, method in said:
            if not 0 <= latent < d_sae:
                raise ValueError(f"{path} has latent {latent}; the SAE has 0 to {d_sae - 1}")
            if text:
                found.setdefault(latent, []).append((text, method))
    return found


def _plain(explanation: Explanation) -> dict[str, Any]:
    return {
        name: [tally._asdict() | {"score": tally.score} for tally in value] if _is_halves(name, value) else value
        for name, value in explanation._asdict().items()
    }


def _explanation(value: dict[str, Any]) -> Explanation:
    fields: dict[str, Any] = {name: _halves(part) if _is_halves(name, part) else part for name, part in value.items()}
    if fields["partners"] is not None:
        fields["partners"] = tuple(fields["partners"])
    return Explanation(**fields)


def _is_halves(name: str, value: Any) -> bool:
    return value is not None and name not in ("text", "method", "partners")


def _halves(value: list[dict[str, Any]]) -> Halves:
    first, second = (Tally(**{name: tally[name] for name in Tally._fields}) for tally in value)
    return first, second
