"""What a strength means: a number in units of the latent's activation, of its maximum, or of the median norm of what is written."""

import re
from dataclasses import dataclass

from saebench.index import FeatureIndex
from saebench.sae import SAE
from saebench.steer.interventions import Mode

MOST = 1e9
_STRENGTH = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)([xn]?)", re.IGNORECASE)


@dataclass(frozen=True)
class Units:
    """What a strength of one latent is in others' units."""

    decoder_norm: float
    maximum: float | None = None
    """the latent's highest activation in the index"""
    median_norm: float | None = None
    """of the vectors at the hook that is written; of several, of their vectors one behind the other"""

    def raw(self, strength: str | int | float, mode: Mode = "add") -> float:
        """The strength that is written `12`, `6x` (times the maximum) or `0.5n` (a vector of so many median norms).

        For `scale` it is a factor and has no unit. Raises ValueError for anything else, and for a unit that is not known here.
        """
        match = _STRENGTH.fullmatch(str(strength).strip())
        if match is None:
            raise ValueError(
                f"strength {strength!r} is not known; expected 12 (raw), 6x (times the latent's maximum) or 0.5n (of the median norm)"
            )
        value, unit = float(match[1]), match[2].lower()
        if not abs(value) <= MOST:
            raise ValueError(f"strength {strength!r} is beyond {MOST:g}; expected what a residual stream can hold")
        if not unit:
            return value
        if mode == "scale":
            raise ValueError(f"strength {strength!r} has a unit; what scale takes is a factor, such as 2")
        return value * self._in(unit)

    def all(self, raw: float) -> dict[str, float | None]:
        """A raw strength in every unit: `raw`, `max` and `norm`, None where that unit is not known."""
        found: dict[str, float | None] = {"raw": raw}
        for name, unit, known in (("max", "x", self.maximum), ("norm", "n", self.median_norm)):
            found[name] = raw / self._in(unit) if known else None
        return found

    def _in(self, unit: str) -> float:
        known = self.maximum if unit == "x" else self.median_norm
        if known is None:
            what = (
                "the latent's maximum is not known without an index"
                if unit == "x"
                else "the median norm is not known without an index and its store"
            )
            raise ValueError(f"{what}: run `saebench index`, or give a raw strength")
        if known == 0:
            raise ValueError(
                "the latent never fired in the index, so that its maximum is 0; give a strength in n or raw"
            )
        return known if unit == "x" else known / self.decoder_norm


def units_of(sae: SAE, latent: int, index: FeatureIndex | None = None) -> Units:
    """The units of a latent; without an index only the raw one, without its store not that of the norm."""
    if not 0 <= latent < sae.d_sae:
        raise ValueError(f"latent is {latent}; the SAE has 0 to {sae.d_sae - 1}")
    norm = float(sae.W_dec[latent].norm())
    if index is None:
        return Units(norm)
    median = index.store.median_norm(index.ends.writes) if index.has_store else None
    return Units(norm, float(index.columns["max"][latent]), median)
