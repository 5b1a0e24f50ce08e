"""One SAE of a grid: its weights, its optimizer, and one training step."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saebench.sae import SAE, initialise, new_sae
from saebench.train.objectives import OBJECTIVES, Context, Loss
from saebench.train.schedules import Sparsity, learning_rate

CLIP = 1.0
UNIT_ROWS = frozenset({"topk", "gated"})  # decoder rows kept at norm 1 throughout training
RESAMPLED = frozenset({"relu", "gated"})  # the others revive dead latents by their auxiliary loss
_ENCODER_SHARE = 0.2  # of the living latents' mean encoder norm, for a resampled one (Bricken et al. 2023)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One point of a grid. Sparsity is set by exactly one of k, target_l0 and l1."""

    name: str
    architecture: str
    d_sae: int
    k: int | None = None
    target_l0: float | None = None
    l1: float | None = None
    lr: float
    seed: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Member:
    """Everything a step changes, so that saving and restoring `state` resumes bit for bit."""

    def __init__(self, spec: Spec, mean_D: Float[Tensor, " D"], dead_steps: int, n_steps: int, device: str) -> None:
        self.spec, self.dead_steps, self.n_steps = spec, dead_steps, n_steps
        self.sae: SAE = new_sae(spec.architecture, len(mean_D), spec.d_sae, k=spec.k)
        initialise(self.sae, mean_D, torch.Generator().manual_seed(spec.seed))
        self.sae.to(device)
        beta1 = 0.0 if spec.architecture == "gated" else 0.9
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=spec.lr, betas=(beta1, 0.999), fused=True)
        self.sparsity = Sparsity(spec.l1, spec.target_l0, device)
        self.silent_steps = torch.zeros(spec.d_sae, dtype=torch.int32, device=device)
        self.sums: dict[str, Tensor] = {}  # of logged quantities since the last line of the log

    def step(self, x_BD: Float[Tensor, "B D"], step: int) -> None:
        """One update of the weights on inputs scaled to E‖x‖² = D."""
        sae = self.sae
        out = sae(x_BD)
        context = Context(self.sparsity.coefficient(step, self.n_steps), self.silent_steps >= self.dead_steps)
        loss = OBJECTIVES[sae.architecture](sae, x_BD, out, context)
        loss.total.backward()
        if sae.architecture in UNIT_ROWS:
            _remove_parallel(sae)
        norm = torch.nn.utils.clip_grad_norm_(sae.parameters(), CLIP)
        self.optimizer.param_groups[0]["lr"] = learning_rate(step, self.n_steps, self.spec.lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if sae.architecture in UNIT_ROWS:
            _renormalise(sae)
        with torch.no_grad():
            self._observe(x_BD, out.acts, loss, norm, context, step)
            if self._resamples_at(step):
                self._resample(x_BD, (x_BD - out.x_hat).pow(2).sum(1), step)

    def _observe(self, x_BD: Tensor, acts_BF: Tensor, loss: Loss, norm: Tensor, context: Context, step: int) -> None:
        fires_F = (acts_BF != 0).sum(0)
        self.silent_steps = torch.where(fires_F > 0, 0, self.silent_steps + 1).int()
        l0 = fires_F.sum() / len(x_BD)
        self.sparsity.observe(l0, step, self.n_steps)
        values = {
            "loss": loss.total,
            "mse": loss.reconstruction,
            "sparsity": loss.sparsity,
            "aux": loss.auxiliary,
            "variance": (x_BD - x_BD.mean(0)).pow(2).sum(1).mean(),
            "l0": l0,
            "grad_norm": norm,
            "coefficient": context.coefficient,
            "steps": torch.ones(()),
        }
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, torch.zeros((), dtype=torch.float64, device=x_BD.device)) + value

    def finite(self) -> bool:
        """Whether every loss and gradient since the last line of the log was finite, and so the weights are."""
        return all(bool(self.sums[name].isfinite()) for name in ("loss", "grad_norm") if name in self.sums)

    def log_line(self, step: int) -> dict[str, Any]:
        """Means since the last line; the only place where the host waits for the device."""
        means = {name: float(value / self.sums["steps"]) for name, value in self.sums.items()}
        self.sums = {}
        alive = int((self.silent_steps < self.dead_steps).sum())
        line = {name: means[name] for name in ("loss", "mse", "sparsity", "aux", "l0", "grad_norm")}
        line |= {
            "fvu": means["mse"] / means["variance"],
            "alive": alive,
            "lr": learning_rate(step, self.n_steps, self.spec.lr),
        }
        if self.spec.k is None:
            line["lambda"] = means["coefficient"]
        return line

    # ------------------------------------------------------------------------------ resampling

    def _resamples_at(self, step: int) -> bool:
        """Every `dead_steps`, once λ is up and while there is time left to learn from it."""
        due = (step + 1) % self.dead_steps == 0 and 0.1 * self.n_steps <= step <= 0.6 * self.n_steps
        return due and self.sae.architecture in RESAMPLED

    def _resample(self, x_BD: Tensor, error_B: Tensor, step: int) -> None:
        """Point dead latents at badly reconstructed inputs (Bricken et al. 2023, "Neuron resampling")."""
        dead = (self.silent_steps >= self.dead_steps).nonzero().flatten()
        if len(dead) == 0 or len(dead) == self.spec.d_sae:
            return
        sae = self.sae
        alive = self.silent_steps < self.dead_steps
        generator = torch.Generator(device=x_BD.device).manual_seed(self.spec.seed * 1_000_003 + step)
        rows = torch.multinomial(error_B.double().pow(2), len(dead), replacement=True, generator=generator)
        directions = torch.nn.functional.normalize(x_BD[rows] - sae.b_dec, dim=1)
        sae.W_dec[dead] = directions * sae.W_dec[alive].norm(dim=1).mean()
        sae.W_enc[:, dead] = directions.T * (_ENCODER_SHARE * sae.W_enc[:, alive].norm(dim=0).mean())
        for name, parameter in sae.named_parameters():
            if name == "b_dec":
                continue
            where = (slice(None), dead) if name == "W_enc" else (dead,)
            if name not in ("W_enc", "W_dec"):
                parameter[where] = 0.0
            # With no second moment Adam's next step would be many times lr, and undo the direction.
            living = (slice(None), alive) if name == "W_enc" else (alive,)
            moments = self.optimizer.state[parameter]
            moments["exp_avg"][where] = 0.0
            moments["exp_avg_sq"][where] = moments["exp_avg_sq"][living].mean()
        self.silent_steps[dead] = 0

    # ------------------------------------------------------------------------------ checkpoint

    def state(self) -> dict[str, Tensor]:
        """Every tensor that a step reads or writes."""
        state = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            state |= {f"adam.{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        state |= {f"sums.{name}": value for name, value in self.sums.items()}
        return state | {"silent_steps": self.silent_steps, **self.sparsity.state()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`. Raises ValueError when the tensors are those of another SAE."""
        mine = {name: tuple(value.shape) for name, value in self.sae.state_dict().items()}
        theirs = {name[4:]: tuple(value.shape) for name, value in state.items() if name.startswith("sae.")}
        if mine != theirs:
            raise ValueError(
                f"the checkpoint of {self.spec.name} holds weights {theirs}, expected {mine}: use the store and sizes it began with"
            )
        device = self.silent_steps.device
        self.sae.load_state_dict({name: state[f"sae.{name}"] for name in mine})
        for name, parameter in self.sae.named_parameters():
            prefix = f"adam.{name}."
            moments = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            self.optimizer.state[parameter] = {key: value.to(device) for key, value in moments.items()}
        self.sums = {name[5:]: value.to(device) for name, value in state.items() if name.startswith("sums.")}
        self.silent_steps = state["silent_steps"].to(device)
        self.sparsity.restore(state)


@torch.no_grad()
def _remove_parallel(sae: SAE) -> None:
    """Take from the gradient of each decoder row its part along the row."""
    gradient = sae.W_dec.grad
    assert gradient is not None
    gradient -= (gradient * sae.W_dec).sum(1, keepdim=True) * sae.W_dec


@torch.no_grad()
def _renormalise(sae: SAE) -> None:
    sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
