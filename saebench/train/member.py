"""One SAE of a grid: its weights, its optimizer, and one training step."""

import contextlib
import math
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saebench.sae import SAE, JumpReLUSAE, Writes, initialise, new_sae
from saebench.train.controls import FROZEN, keep_near
from saebench.train.gradients import Gradients, alone, shared_gradients
from saebench.train.muon import step_by_muon
from saebench.train.objectives import Context, bandwidth
from saebench.train.recipes import EDITIONS, RECIPES
from saebench.train.resampling import keys_of, point
from saebench.train.schedules import Sparsity, learning_rate
from saebench.train.shares import Share
from saebench.train.spec import Spec

CLIP = 1.0
LOOK_EVERY = 50  # steps on a GPU between moments when the host reads from it
ROOM = 2.0  # times the most active pairs of late, for those of the next steps on a GPU
# Share of active latents from which dense products are faster; on a GPU also by whether those may be in TF32.
DENSE_ABOVE = {"cpu": 0.15, "cuda": 0.06, "cuda tf32": 0.01}
_THRESHOLD_RATE = 0.01  # of BatchTopK's running mean of the least activation
_POOLED = 16  # steps before a resampling whose rows are drawn from
_NONE = torch.empty(0, dtype=torch.int64)
_SUMS = ("loss", "mse", "sparsity", "aux", "variance", "l0", "grad_norm", "coefficient", "steps")
_OWN = ("sums", "silent_steps", "diverged_at", "pool", "pool_keys")


class Member:
    """Everything a step changes, so that saving and restoring `state` resumes bit for bit."""

    def __init__(
        self, spec: Spec, mean_D: Float[Tensor, " D"], dead_steps: int, n_steps: int, device: str, bf16: bool = False,
        *, mean_E: Float[Tensor, " E"] | None = None, parts: tuple[int, ...] = (), share: Share | None = None,
    ) -> None:  # fmt: skip
        """On rows of a mean; with `mean_E` it writes other vectors, of that mean, and with `parts` those of hooks of such widths.

        With `share` it is this process's part of an SAE.
        """
        writes = Writes(d_out=None if mean_E is None else len(mean_E), skip=spec.skip, parts=parts)
        self.spec, self.dead_steps, self.n_steps, self.bf16 = spec, dead_steps, n_steps, bf16
        self.share = share or Share()
        self.company: Sequence[Member] = (self,)
        """those whose steps go together: the members of a joint set"""
        self.recipe, self.edition = RECIPES[spec.architecture], EDITIONS[spec.edition]
        sae = new_sae(self.recipe.sae.architecture, len(mean_D), spec.d_sae, k=spec.k, writes=writes)
        initialise(sae, mean_D, torch.Generator().manual_seed(spec.seed), self.recipe.gains, mean_E)
        self.sae: SAE = self.share.part(sae).to(device)
        if isinstance(self.sae, JumpReLUSAE):
            self.sae.threshold.requires_grad_(not self.recipe.takes_k)
            self.sae.threshold.data.fill_(0.0 if self.recipe.takes_k else bandwidth(self.sae.d_in))
        frozen = FROZEN.get(spec.control, ())
        self.parameters = {
            name: value for name, value in self.sae.named_parameters() if value.requires_grad and name not in frozen
        }
        # The same memory seen as `[F, D]`, contiguous: the optimizer copies anything else, and every
        # parameter but b_dec and W_skip is now a row for each latent.
        if "W_enc" in self.parameters:
            self.parameters["W_enc"] = torch.nn.Parameter(self.sae.W_enc.data.T)
        self.start_FD = (
            torch.nn.functional.normalize(self.sae.W_dec.detach()) if spec.control == "soft-frozen" else None
        )
        self._by_muon = self.parameters.get("W_enc") if self.edition.muon else None
        kinds = {
            name: (self._pace(name), self.edition.shrink * (name == "W_enc"))
            for name, parameter in self.parameters.items()
            if parameter is not self._by_muon
        }
        groups = [
            {"params": [self.parameters[name] for name in kinds if kinds[name] == kind]}
            | {"scale": kind[0], "shrink": kind[1]}
            for kind in sorted(set(kinds.values()))
        ]
        betas = self.edition.beta1 * self.recipe.momentum, self.edition.beta2
        self.optimizer = torch.optim.Adam(groups, lr=spec.lr, betas=betas, fused=True, decoupled_weight_decay=True)
        self.sparsity = Sparsity(spec.l1, spec.target_l0, device, spec.pace)
        self.silent_steps = torch.zeros(self.sae.d_sae, dtype=torch.int32, device=device)
        self.sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)  # since the last line of the log
        self.fullest = torch.zeros((), dtype=torch.int32, device=device)  # since the host last looked
        self.left_out = torch.zeros((), dtype=torch.int32, device=device)  # steps, since the last line of the log
        self.diverged_at = torch.full((), -1, dtype=torch.int64, device=device)
        # Rows that dead latents may be pointed at, those of the largest keys; behind them what is to be written there, if it is another.
        self.pool = torch.empty(0, len(mean_D) + (0 if self.sae.tied else self.sae.d_out), device=device)
        self.pool_keys = torch.empty(0, dtype=torch.float64, device=device)
        self._look()

    def step(self, x_BD: Float[Tensor, "B D"], step: int, y_BE: Float[Tensor, "B E"] | None = None) -> None:
        """One update of the weights on inputs scaled to E‖x‖² = D, and what is to be written there (default: the same) to
        E‖y‖² = E; none where the loss or its gradient is not finite."""
        alone(self.steps(x_BD, step, y_BE))

    def steps(
        self,
        x_BD: Float[Tensor, "B D"],
        step: int,
        y_BE: Float[Tensor, "B E"] | None = None,
        variance: Tensor | None = None,
    ) -> Generator[Tensor, Tensor, None]:
        """The same beside others that write to the same hooks: it gives errors and is sent those of all. `variance` and `y_BE` are as
        `shared_gradients` has them."""
        if not x_BD.is_cuda or step % LOOK_EVERY == 0 or self.spec.joint:
            self._look()
        context = Context(self.sparsity.coefficient(step, self.n_steps), self._dead, self.spec.k)
        pools = self._steps_to_resampling(step) < _POOLED
        gradients = yield from shared_gradients(
            self.recipe.gradients, self.sae, x_BD, context, y_BE, variance=variance,
            dense=self._dense, guess=self._guess, bf16=self.bf16, most=self._most, keeps_errors=pools and self.spec.joint,
            share=self.share,
        )  # fmt: skip
        assert gradients.fires_F is not None
        gradients.fired = gradients.fires_F.sum()
        self.share.settle(gradients)
        if self.recipe.unit_rows:
            # Take from the gradient of each unit row its part along the row.
            assert gradients.along_F is not None
            gradients.of["W_dec"].addcmul_(gradients.along_F[:, None], self.sae.W_dec, value=-1)
        if self.spec.joint:
            # Each hook has one bias: that of the dictionary of its own layer, which writes there first.
            gradients.of["b_dec"][self.sae.parts[0] :] = 0.0
        counted = {name: g for name, g in gradients.of.items() if name in self.parameters and name != "threshold"}
        norm = self.share.norm(counted)
        assert gradients.total is not None
        fine = norm.isfinite() & gradients.total.isfinite()
        bad = ~(fine & gradients.of["threshold"].isfinite().all() if "threshold" in gradients.of else fine)
        bad |= self.diverged_at >= 0  # no step more: what is kept are the weights of before
        bad, full = self.share.either(bad, self._full(gradients))
        self._update(gradients, norm, bad | full, step)
        with self._kept_where(full):
            self._observe(gradients, norm, bad, context, step)
            if pools:
                if gradients.errors:
                    y_BE = self.share.reconstructed(self.sae, x_BD) - torch.cat(gradients.errors)
                self._pool(x_BD if y_BE is None else torch.cat([x_BD, y_BE], 1), gradients.error_B * ~full, step)
        if self._steps_to_resampling(step) == 0:
            self._resample()

    def _learning_rate(self, step: int) -> float:
        return learning_rate(step, self.n_steps, self.spec.lr, self.spec.warmup, self.spec.decay)

    def _pace(self, name: str) -> float:
        """Learning rate relative to lr: √D for thresholds, which alone move where a row of weights turns D numbers."""
        return {"threshold": self.sae.d_in**0.5, "W_dec": self.edition.decoder}.get(name, 1.0)

    def _look(self) -> None:
        """What decides the kind of the next steps' products; read from the device seldom, since it has to be waited for."""
        self._dead = (self.silent_steps >= self.dead_steps).nonzero()[:, 0] if self.recipe.takes_k else _NONE
        l0s = [float(member.sparsity.l0) for member in self.company]  # before the first step they are nan
        where = self.silent_steps.device.type
        where += " tf32" if where == "cuda" and torch.backends.cuda.matmul.allow_tf32 else ""
        dense_above = DENSE_ABOVE[where] * self.spec.d_sae
        self._dense = not self.recipe.takes_k and not all(l0 < dense_above for l0 in l0s)
        self._most: int | None = None
        self._guess = 0.0
        if self.silent_steps.is_cuda and not self.spec.joint:
            # Twice what it was of late: a step whose active pairs do not fit is left out. At first they are waited for.
            self._most = round(ROOM * int(self.fullest)) or None
            self.fullest = torch.zeros_like(self.fullest)
        elif self.recipe.takes_k and isinstance(self.sae, JumpReLUSAE):
            self._guess = 0.9 * float(self.sae.threshold.detach()[0])

    def _full(self, gradients: Gradients) -> Bool[Tensor, ""]:
        """Whether there was no room for all active pairs, so that this step must not be taken."""
        if gradients.fullest is None:
            return torch.zeros((), dtype=torch.bool, device=self.fullest.device)
        self.fullest = torch.maximum(self.fullest, gradients.fullest)
        return gradients.fullest >= (torch.inf if gradients.most is None else gradients.most)

    @contextlib.contextmanager
    def _kept_where(self, full: Bool[Tensor, ""]) -> Iterator[None]:
        """What is learned of a step, beside the weights, is as before where it was left out."""
        if self._most is None:
            yield
            return
        before = {name: value.clone() for name, value in self.sparsity.state().items()}
        sums, silent_steps = self.sums, self.silent_steps
        yield
        self.left_out += full
        self.sums, self.silent_steps = (
            torch.where(full, sums, self.sums),
            torch.where(full, silent_steps, self.silent_steps),
        )
        self.sparsity.restore(
            {name: torch.where(full, before[name], now) for name, now in self.sparsity.state().items()}
        )

    def _update(self, gradients: Gradients, norm: Tensor, bad: Tensor, step: int) -> None:
        """Adam, with the clipping of the gradient's norm and the skip of a bad step inside its one pass over memory."""
        for name, parameter in self.parameters.items():
            parameter.grad = gradients.of[name]
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * self._learning_rate(step)
            group["weight_decay"] = group["shrink"] * (1 - step / self.n_steps)
        self.optimizer.grad_scale = (norm / CLIP).clamp(min=1.0).float()  # type: ignore[attr-defined]
        self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        if self._by_muon is not None:
            shrink = self.edition.shrink * (1 - step / self.n_steps)
            step_by_muon(self._by_muon, self.optimizer, self.share, self._learning_rate(step), shrink)
            self._by_muon.grad = None
        self.optimizer.zero_grad(set_to_none=True)
        if self.start_FD is not None:
            keep_near(self.sae.W_dec, self.start_FD)
        if self.recipe.unit_rows and "W_dec" in self.parameters:
            self.sae.W_dec /= torch.where(bad, 1.0, self.sae.W_dec.norm(dim=1, keepdim=True))
        if isinstance(self.sae, JumpReLUSAE):
            if not self.recipe.takes_k:
                self.sae.threshold.clamp_(min=bandwidth(self.sae.d_in) / 2)
            elif gradients.least_active is not None:
                rate, least = max(_THRESHOLD_RATE, 1 / (step + 1)), gradients.least_active
                self.sae.threshold += torch.where(least.isfinite() & ~bad, rate * (least - self.sae.threshold), 0.0)

    def _observe(self, gradients: Gradients, norm: Tensor, bad: Tensor, context: Context, step: int) -> None:
        assert gradients.fires_F is not None
        assert gradients.fired is not None
        loss = gradients.loss
        self.diverged_at = torch.where(bad & (self.diverged_at < 0), step, self.diverged_at)
        self.silent_steps = torch.where(gradients.fires_F > 0, 0, self.silent_steps + 1).int()
        l0 = gradients.fired / gradients.n_rows
        self.sparsity.observe(l0, step, self.n_steps)
        values = (
            loss.total,
            loss.reconstruction,
            loss.sparsity,
            loss.auxiliary,
            gradients.variance,
            l0,
            norm,
            context.coefficient,
        )
        self.sums = self.sums + torch.stack([*values, torch.ones_like(norm)]).double()

    @property
    def diverged(self) -> int | None:
        """The first step whose loss or gradient was not finite; the weights are those from before it."""
        step = int(self.diverged_at)
        return None if step < 0 else step

    def log_line(self, step: int) -> dict[str, Any]:
        """Means since the last line; here the host waits for the device."""
        *sums, steps = self.sums.tolist()
        means = {name: value / steps if steps else math.nan for name, value in zip(_SUMS, sums, strict=False)}
        self.sums = torch.zeros_like(self.sums)
        alive = self.share.count(int((self.silent_steps < self.dead_steps).sum()))
        line = {name: means[name] for name in ("loss", "mse", "sparsity", "aux", "l0", "grad_norm")}
        line |= {
            "fvu": means["mse"] / means["variance"],
            "alive": alive,
            "lr": self._learning_rate(step),
        }
        if self.spec.k is None:
            line["lambda"] = means["coefficient"]
        if left_out := int(self.left_out):
            line["steps_left_out"] = left_out
            self.left_out.zero_()
        return line

    # ------------------------------------------------------------------------------ resampling

    def _steps_to_resampling(self, step: int) -> float:
        """It is every `dead_steps`, once λ is up and while there is time left to learn from it; none of a control, whose directions are its own."""
        left = float(-(step + 1) % self.dead_steps)
        due = (
            not self.recipe.takes_k
            and not self.spec.control
            and 0.1 * self.n_steps <= step + left <= 0.9 * self.n_steps
        )
        return left if due else torch.inf

    def _pool(self, x_BD: Float[Tensor, "B D"], error_B: Float[Tensor, " B"], step: int) -> None:
        """Draw from the rows of several batches by their squared loss; the pool keeps as many as a batch has.

        What it has of the rows of this process is all that matters of them in the end.
        """
        generator = torch.Generator(device=x_BD.device).manual_seed(self.spec.seed * 1_000_003 + step)
        n_rows = self.share.n_rows(len(x_BD))
        u_B = torch.rand(n_rows, dtype=torch.float64, generator=generator, device=x_BD.device)
        keys = torch.cat([self.pool_keys, keys_of(self.share.rows_of(u_B), error_B)])
        self.pool_keys, best = keys.topk(min(n_rows, len(keys)))
        self.pool = torch.cat([self.pool, x_BD])[best]

    def _resample(self) -> None:
        """Point dead latents at rows of the pool, which is empty then."""
        rows, _ = self.share.pooled(self.pool, self.pool_keys)
        self.pool, self.pool_keys = self.pool[:0], self.pool_keys[:0]
        silent = self.silent_steps >= self.dead_steps
        n_dead = self.share.count(int(silent.sum()))
        if n_dead == 0 or n_dead == self.spec.d_sae or self.diverged is not None:
            return
        self.silent_steps[point(self.sae, self.parameters, self.optimizer, self.share, rows, silent, n_dead)] = 0

    # ------------------------------------------------------------------------------ checkpoint

    def state(self) -> dict[str, Tensor]:
        """Every tensor that a step reads or writes: of a share of rows all, of one of latents this process's."""
        state = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        for name, parameter in self.parameters.items():
            state |= {f"adam.{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        state |= {name: getattr(self, name) for name in _OWN} | self.sparsity.state()
        state["pool"], state["pool_keys"] = self.share.pooled(self.pool, self.pool_keys)
        return state

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
        for name, parameter in self.parameters.items():
            prefix = f"adam.{name}."
            moments = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            self.optimizer.state[parameter] = {key: value.to(device) for key, value in moments.items()}
        for name in _OWN:
            if name in state:  # checkpoints of before there was a pool have none
                setattr(self, name, state[name].to(device))
        self.pool, self.pool_keys = self.share.own_pool(self.pool, self.pool_keys)
        self.sparsity.restore(state)
        self._look()
