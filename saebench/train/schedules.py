"""What changes over a run: the learning rate, and the sparsity coefficient that finds its target."""

import math

import torch
from torch import Tensor

WARMUP = 0.01  # of all steps
DECAY = 0.2
_SPARSITY_WARMUP = 0.05  # of λ

# The controller sets log λ = P e + I ∫e + J ∬e of the relative error e of L0. P answers at once, which damps
# what I alone would overshoot, since L0 follows λ with a lag of about a hundred steps; J follows the slow
# drift of L0 at equal λ that training brings. At a lower learning rate the lag is as much longer, and so are the
# integrals' times: I × pace, J × pace². P × √pace, since L0 also answers within tens of steps, and rings with P alone.
# The integrals take no more than a bounded error, and J none while it is large, as in the first steps, when L0 is high
# whatever λ is.
_PROPORTIONAL = 1.0
_INTEGRAL = 0.04
_DRIFT = _INTEGRAL**2 / 8
_LARGEST_ERROR = 1.0
_LARGEST_DRIFT_ERROR = 0.3
_SMOOTHING = 0.1


def learning_rate(step: int, n_steps: int, peak: float, warmup: float = WARMUP, decay: float = DECAY) -> float:
    """Linear rise over the first `warmup` of the steps, linear fall to 0 over the last `decay` of them."""
    warm = min(1.0, (step + 1) / max(1, warmup * n_steps))
    left = min(1.0, (n_steps - step) / max(1, decay * n_steps))
    return peak * warm * left


def default_learning_rate(d_in: int, n_steps: int) -> float:
    """3e-3 √(256/D) √(4000/steps), no more than 3e-3 √(256/D).

    Measured (benchmarks/results/recipe_*): the best rate falls with the length of the run and, since weights of a row of
    unit norm are of size 1/√D, with the width of the input; it hardly depends on the number of latents or the architecture.
    Higher rates leave dead latents behind.
    """
    return 3e-3 * math.sqrt(256 / d_in) * min(1.0, math.sqrt(4000 / n_steps))


def pace(lr: float, d_in: int) -> float:
    """How fast L0 follows λ, relative to runs of up to 4,000 steps at their default rate: as the learning rate is, no more than 1."""
    return min(1.0, lr / default_learning_rate(d_in, 1))


class Sparsity:
    """λ of a run: fixed after a warm-up, or moved until the mean L0 meets a target, at a `pace`.

    State (`log_coefficient`, `drift`, `l0`, `error`) is four float64 scalars, kept as tensors so that a
    step needs no host synchronisation and a checkpoint is exact.
    """

    def __init__(self, coefficient: float | None, target_l0: float | None, device: str, pace: float = 1.0) -> None:
        self.target = target_l0
        self._gains = _PROPORTIONAL * math.sqrt(pace), _INTEGRAL * pace, _DRIFT * pace**2
        start = coefficient if coefficient is not None else 1.0
        self.log_coefficient = torch.tensor(math.log(start), dtype=torch.float64, device=device)
        self.drift = torch.zeros((), dtype=torch.float64, device=device)
        self.l0 = torch.tensor(math.nan, dtype=torch.float64, device=device)
        self.error = torch.tensor(math.nan, dtype=torch.float64, device=device)

    def coefficient(self, step: int, n_steps: int) -> Tensor:
        """λ at a step, rising linearly over the warm-up."""
        return (self.log_coefficient.exp() * min(1.0, (step + 1) / max(1, _SPARSITY_WARMUP * n_steps))).float()

    def observe(self, l0: Tensor, step: int, n_steps: int) -> None:
        """Take in a batch's mean L0. Nothing moves in the warm-up, when L0 is high whatever λ is."""
        l0 = l0.double()
        self.l0 = torch.where(self.l0.isnan(), l0, self.l0 + _SMOOTHING * (l0 - self.l0))
        if self.target is None or step < _SPARSITY_WARMUP * n_steps:
            return
        error = (self.l0.clamp(min=1e-3) / self.target).log().clamp(-_LARGEST_ERROR, _LARGEST_ERROR)
        change = (error - self.error).nan_to_num(0.0)  # the first time there is none
        self.error = error
        proportional, integral, drift = self._gains
        self.drift += drift * torch.where(error.abs() < _LARGEST_DRIFT_ERROR, error, 0.0)
        self.log_coefficient += proportional * change + integral * error + self.drift

    def state(self) -> dict[str, Tensor]:
        return {
            "log_coefficient": self.log_coefficient,
            "drift": self.drift,
            "l0": self.l0,
            "error": self.error,
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        for name, value in self.state().items():
            value.copy_(state[name])
