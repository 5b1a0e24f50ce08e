"""A function of which units are present, as ANDs and ORs of them: exact, and as few as an L1 norm finds.

v[T] is a scalar of a model when the units in T are present and the others masked; T is a number, whose bit i says of unit i. With N
all units, v is split as v_and + v_or, and

    I_and(S) = Σ_{T⊆S} (-1)^{|S|-|T|} v_and(T)          I_or(S) = -Σ_{T⊆S} (-1)^{|S|-|T|} v_or(N∖T)
    v(T) = v(∅) + Σ_{∅≠S⊆T} I_and(S) + Σ_{S∩T≠∅} I_or(S)

for every T, whatever the split (Li & Zhang 2023, arXiv 2304.13312). Here it is the one of least ‖I_and‖₁ + ‖I_or‖₁. An AND and an OR
of one unit are the same function of T: both are counted among the ANDs. All in float64.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.linalg import eigh

Vector = Float[np.ndarray, " P"]
"""A number for each of the P = 2^n subsets of n units."""

# Each map is a product over units of one of these.
_MOBIUS = np.array([[1.0, 0.0], [-1.0, 1.0]])
_ZETA = np.array([[1.0, 0.0], [1.0, 1.0]])
_EXCHANGE = np.array([[0.0, 1.0], [1.0, 0.0]])  # of T and N∖T
# The columns in which both Gram matrices of the projection are diagonal: that of M is the shares, that of M behind an exchange is 1.
_SHARES, _BASIS = eigh(_MOBIUS.T @ _MOBIUS, _EXCHANGE @ _MOBIUS.T @ _MOBIUS @ _EXCHANGE)
_MAPS = {
    "mobius": _MOBIUS, "zeta": _ZETA, "ands": _MOBIUS @ _BASIS, "ors": _MOBIUS @ _EXCHANGE @ _BASIS,
}  # fmt: skip
_RELAXED = 1.8  # of 2, from where on it need not converge
_STEP = 0.05  # of the largest dividend
_LOOK = 50  # iterations between two looks at the gap


class Split(NamedTuple):
    """ANDs and ORs of a function: entry S of each is the interaction of the units in S, and 0 for none."""

    ands: Vector
    ors: Vector
    """0 where S has one unit: it is among the ANDs"""
    empty: float
    """v(∅)"""
    gap: float
    """(‖I‖₁ − a lower bound of it, by the dual) / ‖I‖₁: at 0 no split is sparser; NaN where none was looked for"""

    def rebuilt(self) -> Vector:
        """v at every masking."""
        return self.empty + zeta(self.ands) + self.ors.sum() - zeta(self.ors)[::-1]


def mobius(v: Vector) -> Vector:
    """Σ_{T⊆S} (-1)^{|S|-|T|} v(T) for every S: Harsanyi's dividends. Raises ValueError for a length that is no power of 2."""
    return _apply("mobius", v)


def zeta(dividends: Vector) -> Vector:
    """Σ_{S⊆T} I(S) for every T: what `mobius` undoes. Raises ValueError for a length that is no power of 2."""
    return _apply("zeta", dividends)


def orders(n: int) -> Int[np.ndarray, " P"]:
    """|S| of every subset of n units."""
    return np.bitwise_count(np.arange(2**n)).astype(np.int64)


def and_only(v: Vector) -> Split:
    """All of v as ANDs. Raises ValueError for a length that is no power of 2."""
    ands = mobius(v)
    ands[0] = 0.0
    return Split(ands, np.zeros_like(ands), float(v[0]), float("nan"))


def split(v: Vector, *, close: float = 1e-5, most: int = 2000) -> Split:
    """The AND-OR split of least L1 norm, to a share `close` of it or to what `most` iterations come to: faithful in either case.

    Douglas and Rachford's iteration, between soft thresholds and the projection on all (I_and, I_or) that give v, which is exact in a
    few products over units. Raises ValueError for a length that is no power of 2.
    """
    n = _units(v)
    scale = float(np.abs(v - v[0]).max()) or 1.0
    offset, weights = mobius((v[::-1] - v[0]) / scale), _weights(n)

    def project(z: Float[np.ndarray, "2 P"], offset: Vector | float) -> Float[np.ndarray, "2 P"]:
        inner = weights * (_apply("ands", z[0], True) + _apply("ors", z[1] + offset, True))
        return np.stack([_apply("ands", inner), _apply("ors", inner) - offset])

    units = np.zeros((2, 2, len(v)))  # entries of ∅, which cost nothing and which the dual must not have
    units[0, 0, 0] = units[1, 1, 0] = 1
    nulls = np.stack([one - project(one, 0.0) for one in units])
    z = best = project(np.zeros((2, len(v))), offset)
    step = _STEP * (float(np.abs(z).max()) or 1.0)
    least, bound = np.inf, 0.0
    for count in range(1, most + 1):
        x = project(z, offset)
        if count % _LOOK == 0 or count == most:
            if (norm := float(np.abs(x[:, 1:]).sum())) < least:
                best, least = x, norm
            dual = (x - z) / step  # orthogonal to whatever leaves v as it is
            dual = dual - np.tensordot(np.linalg.solve(nulls[:, :, 0].T, dual[:, 0]), nulls, 1)
            bound = max(bound, float((dual * x).sum()) / max(1.0, float(np.abs(dual).max())))
            if least - bound <= close * least:
                break
        y = 2 * x - z
        y[:, 1:] -= np.clip(y[:, 1:], -step, step)
        z = z + _RELAXED * (y - x)
    return _together(best * scale, float(v[0]), (least - bound) / least if least else 0.0)


def _together(x: Float[np.ndarray, "2 P"], empty: float, gap: float) -> Split:
    ands, ors = x
    alone = orders(_units(ands)) == 1
    ands, ors = np.where(alone, ands + ors, ands), np.where(alone, 0.0, ors)
    ands[0] = ors[0] = 0.0
    return Split(ands, ors, empty, gap)


def _units(v: Vector) -> int:
    n = len(v).bit_length() - 1
    if len(v) != 2**n:
        raise ValueError(f"there are {len(v)} values; expected 2^n, one for each subset of n units")
    return n


@cache
def _half(name: str, n: int) -> Float[np.ndarray, "Q Q"]:
    return np.ones((1, 1)) if n == 0 else np.kron(_half(name, n - 1), _MAPS[name])


def _apply(name: str, v: Vector, transposed: bool = False) -> Vector:
    """A product over units, as two small matrices: of half of the units each."""
    n = _units(v)
    left, right = _half(name, n // 2), _half(name, n - n // 2)
    if transposed:
        left, right = left.T, right.T
    return (left @ v.reshape(len(left), len(right)) @ right.T).ravel()


@cache
def _weights(n: int) -> Vector:
    shares = np.ones(1)
    for _ in range(n):
        shares = np.kron(shares, _SHARES)
    return 1 / (1 + shares)
