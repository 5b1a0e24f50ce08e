"""One training step's exact gradients, without autograd: the encoder's product, and then active pairs only.

The same figures as `objectives.py` (whose docstrings hold the formulas), to rounding. A function per
architecture; what is elementwise is written once for sparse and dense codes, since ReLU, Gated and
JumpReLU start with most latents active. z is what the encoder reads, and t what the latents are to add up to: one tensor of an
SAE. A rule is a generator: it gives the errors of what its dictionary writes, and goes on with those that it is sent back, which
are the same unless others write to the same hooks. Legend: B rows of the batch, R rows of a block of it, D d_in, E d_out, F latents, N entries of the code.
"""

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saebench.sae import SAE, GatedSAE, JumpReLUSAE, ReLUSAE, topk_relu
from saebench.sae.sparse import Code, DenseCode, Encoder, rows_of_a_block
from saebench.train.objectives import AUX_WEIGHT, Context, Loss, bandwidth, prefixes
from saebench.train.shares import Share

Result = TypeVar("Result")
_DENSE_SHARE = {
    "cpu": 0.25,
    "cuda": 0.5,
}  # of a block's rows where all latents are taken: about ten such arrays are held at once
_SPARSE_AUX = 4  # AuxK takes sparse products when there are this many dead latents to one of k_aux


class Kin(NamedTuple):
    """What TopK and its kin differ in."""

    of_rows: bool = False
    """k latents are active in each row, not k on average over a batch"""
    nested: bool = False
    """the error is that of Matryoshka's nested SAEs"""


@dataclass
class Gradients:
    """Sums over the rows seen so far, divided by the whole batch's rows: of this process's share, until that is settled.

    `of` maps a parameter's name to the loss's gradient; that of W_enc is `[F, D]`, as it lies in memory.
    """

    n_rows: int
    variance: Float[Tensor, ""]
    """Σ_e var_e of what is written"""
    bf16: bool = False
    keeps_errors: bool = False
    """whether `errors` is wanted"""
    most: int | None = None
    """room for active pairs in each block of rows; None: as many as there are"""
    share: Share = field(default_factory=Share)
    """what other processes do of the step"""
    of: dict[str, Tensor] = field(default_factory=dict)
    squared_errors: list[Float[Tensor, " R"]] = field(default_factory=list)
    errors: list[Float[Tensor, "R E"]] = field(default_factory=list)
    """what is written, by all that write there, less what is to be written"""
    along_F: Tensor | None = None
    """W_dec[f] · dLoss/dW_dec[f], which the entries give without a pass over the weights (where decoder rows stay at norm 1)"""
    fires_F: Tensor | None = None
    least_active: Float[Tensor, ""] | None = None
    """least positive activation: what BatchTopK's threshold is learned from"""
    fullest: Int[Tensor, ""] | None = None
    """active pairs of the block of rows that has most; where that is `most`, some may have been left out"""
    fired: Float[Tensor, ""] | None = None
    """active pairs"""
    reconstruction: Float[Tensor, ""] | None = None
    """mean ‖x − x̂‖², where not all rows are here"""
    sparsity: Float[Tensor, ""] | None = None
    auxiliary: Float[Tensor, ""] | None = None
    total: Float[Tensor, ""] | None = None

    def add(self, name: str, value: Tensor) -> None:
        self.of[name] = self.of[name].add_(value) if name in self.of else value

    def count(self, name: str, value: Tensor) -> None:
        before = getattr(self, name)
        setattr(self, name, value if before is None else before + value)

    @property
    def error_B(self) -> Float[Tensor, " B"]:
        """‖x − x̂‖² of each row."""
        return torch.cat(self.squared_errors)

    @property
    def loss(self) -> Loss:
        assert self.total is not None
        reconstruction = self.error_B.mean() if self.reconstruction is None else self.reconstruction
        zero = torch.zeros_like(reconstruction)
        return Loss(
            self.total,
            reconstruction,
            zero if self.sparsity is None else self.sparsity,
            zero if self.auxiliary is None else self.auxiliary,
        )


Errors = Generator[Tensor, Tensor, None]
"""Of what one dictionary writes, `[..., E]`; sent back are those of all that is written there."""
Penalised = Callable[[Any, Tensor, Tensor, Context, Gradients, bool], Errors]
"""Adds to the gradients those of a block of rows, read and written; the last of its arguments is `dense` of `exact_gradients`."""


def exact_gradients(
    rule: Penalised | Kin,
    sae: Any,
    x_BD: Float[Tensor, "B D"],
    context: Context,
    y_BE: Float[Tensor, "B E"] | None = None,
    **how: Any,
) -> Gradients:
    """Gradients of an architecture's objective, by the rule in its recipe, and what a step observes; `y` is written, or x itself.

    `how` is as `shared_gradients` has it, whose dictionary is here the only one that writes.
    """
    return alone(shared_gradients(rule, sae, x_BD, context, y_BE, **how))


def shared_gradients(
    rule: Penalised | Kin,
    sae: Any,
    x_BD: Float[Tensor, "B D"],
    context: Context,
    y_BE: Float[Tensor, "B E"] | None = None,
    *,
    variance: Float[Tensor, ""] | None = None,
    dense: bool = False,
    guess: float = 0.0,
    bf16: bool = False,
    most: int | None = None,
    keeps_errors: bool = False,
    share: Share | None = None,
) -> Generator[Tensor, Tensor, Gradients]:
    """As `exact_gradients`, of a dictionary beside which others may write; it gives errors and is sent those of all.

    Of several, `y` is at each hook what is to be written there for one of them, and 0 for the others, and `variance` Σ_e var_e of what is to be
    written at this one's hooks in all. `dense` takes all latents of a row as active, for ReLU, Gated and JumpReLU early in training; the
    result is the same. `guess` is what BatchTopK's least activation may be expected to exceed. `bf16`
    rounds what the encoder multiplies to bfloat16 (sums in float32), and nothing else. With `most`, room for the
    active pairs of a block of rows, no such search waits for a GPU; `fullest` says whether it was enough. What is not of this process's
    `share` is asked of others, and `x` and `y` are its rows.
    """
    y_BE = x_BD if y_BE is None else y_BE
    share = share or Share()
    variance = share.variance_of(y_BE) if variance is None else variance
    gradients = Gradients(share.n_rows(len(x_BD)), variance, bf16, keeps_errors, most, share)
    if isinstance(rule, Kin):
        yield from _topk_kin(rule, sae, x_BD, y_BE, context, gradients, guess)
        return gradients
    at_once = rows_at_once(sae.d_sae, len(x_BD), x_BD.device, dense)
    for x_RD, y_RE in zip(x_BD.split(at_once), y_BE.split(at_once), strict=True):
        yield from rule(sae, x_RD, y_RE, context, gradients, dense)
    return gradients


@torch.no_grad()
def alone(running: Generator[Tensor, Tensor, Result]) -> Result:
    """What a generator of errors comes to that is sent its own."""
    sent = None
    while True:
        try:
            sent = running.send(sent)  # type: ignore[arg-type]
        except StopIteration as end:
            return end.value


@torch.no_grad()
def together(
    running: Sequence[Generator[Tensor, Tensor, Any]], writes: Sequence[Sequence[str]], widths: dict[str, int]
) -> None:
    """Run generators of errors in step; each is sent, of each hook that it writes, the sum of what all give there."""
    given = [next(errors) for errors in running]
    while True:
        sums: dict[str, Tensor] = {}
        for errors, hooks in zip(given, writes, strict=True):
            for hook, part in zip(hooks, errors.split([widths[hook] for hook in hooks], -1), strict=True):
                sums[hook] = sums[hook] + part if hook in sums else part
        given = []
        for errors, hooks in zip(running, writes, strict=True):
            with contextlib.suppress(StopIteration):  # all of them end at once, the rule being one
                given.append(errors.send(torch.cat([sums[hook] for hook in hooks], -1)))
        if not given:
            return
        assert len(given) == len(running)


def rows_at_once(d_sae: int, n_rows: int, device: torch.device, dense: bool) -> int:
    """Rows of a batch of `n_rows` that a penalised architecture takes at a time: each pass goes over all gradients once."""
    if dense:
        return rows_of_a_block(d_sae, device, _DENSE_SHARE.get(device.type, _DENSE_SHARE["cpu"]))
    return n_rows if device.type == "cpu" else rows_of_a_block(d_sae, device)


# ------------------------------------------------------------- with a penalty: any number is active


def add_relu(sae: ReLUSAE, x_RD: Tensor, y_RE: Tensor, context: Context, gradients: Gradients, dense: bool) -> Errors:
    z_RD, t_RE = _ends(sae, x_RD, y_RE, gradients.share)
    code, h = _positive(Encoder(z_RD, sae.W_enc, sae.b_enc, gradients.bf16), dense, gradients)
    acts = torch.relu(h)
    error_RE = yield gradients.share.written(code.decode(acts, sae.W_dec).sub_(t_RE))
    lengths_FH, weight, share = sae.lengths_FH, 2 / gradients.n_rows, context.coefficient / gradients.n_rows
    norms_F, sums_F = lengths_FH.sum(1), code.sum_latents(acts)
    dh = (code.products(error_RE, sae.W_dec).mul_(weight) + share * code.at(norms_F)).mul_(acts > 0)
    decoder_FE = code.accumulate(acts * weight, error_RE)
    along_FH = torch.where(
        lengths_FH > 0, (share * sums_F)[:, None] / lengths_FH, 0.0
    )  # as autograd has it of a zero row
    for h, (part, rows) in enumerate(zip(decoder_FE.split(sae.parts, 1), sae.W_dec.split(sae.parts, 1), strict=True)):
        part.addcmul_(along_FH[:, h, None], rows)
    gradients.add("W_dec", decoder_FE)
    gradients.add("b_enc", _others(sae, code, dh, z_RD, error_RE, weight, gradients))
    sparsity = (sums_F @ norms_F) / gradients.n_rows
    _observe(gradients, code, acts > 0, sparsity, error_RE, context.coefficient * sparsity)


def add_gated(sae: GatedSAE, x_RD: Tensor, y_RE: Tensor, context: Context, gradients: Gradients, dense: bool) -> Errors:
    z_RD, t_RE = _ends(sae, x_RD, y_RE, gradients.share)
    code, gate = _positive(Encoder(z_RD, sae.W_enc, sae.b_gate, gradients.bf16), dense, gradients)
    h, scale_F = gate - code.at(sae.b_gate), sae.r_mag.exp()
    opens, gate = gate > 0, torch.relu(gate)
    acts = torch.relu(h * code.at(scale_F) + code.at(sae.b_mag)) * opens
    error_RE = yield gradients.share.written(code.decode(acts, sae.W_dec).sub_(t_RE))
    frozen_RE = yield gradients.share.written(code.decode(gate, sae.W_dec).sub_(t_RE))
    weight, share = 2 / gradients.n_rows, context.coefficient / gradients.n_rows
    dmag = code.products(error_RE, sae.W_dec).mul_(weight).mul_(acts > 0)
    dgate = (code.products(frozen_RE, sae.W_dec).mul_(weight) + share).mul_(opens)
    gradients.add("W_dec", code.accumulate(acts * weight, error_RE))
    gradients.count("along_F", code.sum_latents(acts * dmag))
    gradients.add("b_mag", code.sum_latents(dmag))
    gradients.add("b_gate", code.sum_latents(dgate))
    gradients.add("r_mag", code.sum_latents(dmag * h) * scale_F)
    _others(sae, code, dgate + dmag * code.at(scale_F), z_RD, error_RE, weight, gradients)
    sparsity = gate.sum() / gradients.n_rows
    auxiliary = gradients.share.once(frozen_RE.norm().square() / gradients.n_rows)
    gradients.count("auxiliary", auxiliary)
    _observe(gradients, code, acts > 0, sparsity, error_RE, context.coefficient * sparsity + auxiliary)


def add_jumprelu(
    sae: JumpReLUSAE, x_RD: Tensor, y_RE: Tensor, context: Context, gradients: Gradients, dense: bool
) -> Errors:
    epsilon = bandwidth(sae.d_in)
    z_RD, t_RE = _ends(sae, x_RD, y_RE, gradients.share)
    floor_F = sae.threshold - epsilon / 2  # entries below θ are needed to learn it
    code, above = _positive(Encoder(z_RD, sae.W_enc, sae.b_enc - floor_F, gradients.bf16), dense, gradients)
    pre, threshold = above + code.at(floor_F), code.at(sae.threshold)
    active, near = pre > threshold, (pre - threshold).abs() < epsilon / 2
    acts = pre * active
    error_RE = yield gradients.share.written(code.decode(acts, sae.W_dec).sub_(t_RE))
    weight, share = 2 / gradients.n_rows, context.coefficient / gradients.n_rows
    dacts = code.products(error_RE, sae.W_dec).mul_(weight)
    gradients.add("W_dec", code.accumulate(acts * weight, error_RE))
    gradients.add("threshold", code.sum_latents(-(dacts * threshold + share) * near / epsilon))
    gradients.add("b_enc", _others(sae, code, dacts * active, z_RD, error_RE, weight, gradients))
    sparsity = active.sum() / gradients.n_rows
    _observe(gradients, code, active, sparsity, error_RE, context.coefficient * sparsity)


def _ends(sae: SAE, x_RD: Tensor, y_RE: Tensor, share: Share) -> tuple[Tensor, Tensor]:
    """(z, t)."""
    z_RD = x_RD - sae.b_pre
    if sae.tied:
        return z_RD, share.once(z_RD)
    t_RE = y_RE - sae.b_dec
    return z_RD, share.once(t_RE if sae.W_skip is None else t_RE.addmm_(z_RD, sae.W_skip, alpha=-1))


def _positive(encoder: Encoder, dense: bool, gradients: Gradients) -> tuple[Code, Tensor]:
    if dense:
        return DenseCode(), encoder.dense()
    code, values = encoder.above(0.0, gradients.most)
    found = code.offsets[-1]
    gradients.fullest = found if gradients.fullest is None else torch.maximum(gradients.fullest, found)
    return code, values


def _others(
    sae: SAE, code: Code, dh: Tensor, z_RD: Tensor, error_RE: Tensor, weight: Tensor | float, gradients: Gradients
) -> Tensor:
    """Gradients of W_enc, b_dec and W_skip, where dLoss/dx̂ is `weight` times the error; returns Σ_r dh `[F]`, that of a bias on h."""
    sums_F = code.sum_latents(dh)
    gradients.add("W_enc", code.accumulate(dh, z_RD))
    db_E = gradients.share.once(error_RE.sum(0) * weight)
    gradients.add("b_dec", db_E - sae.W_enc @ sums_F if sae.tied else db_E)  # z is less b_dec as well
    if sae.W_skip is not None:
        gradients.add("W_skip", gradients.share.once((z_RD.T @ error_RE).mul_(weight)))
    return sums_F


def _observe(
    gradients: Gradients, code: Code, active: Tensor, sparsity: Tensor, error_RE: Tensor, penalty: Tensor
) -> None:
    squared_R = error_RE.norm(dim=1).square()
    if gradients.keeps_errors:
        gradients.errors.append(error_RE)
    gradients.squared_errors.append(squared_R)
    gradients.count("fires_F", code.sum_latents(active.to(squared_R.dtype)))
    gradients.count("sparsity", sparsity)
    gradients.count("total", gradients.share.once(squared_R.sum() / gradients.n_rows) + penalty)


# ----------------------------------------------------------------- TopK and its kin: a fixed number


def _topk_kin(
    kin: Kin, sae: ReLUSAE, x_BD: Tensor, y_BE: Tensor, context: Context, gradients: Gradients, guess: float
) -> Errors:
    """The nested SAEs of Matryoshka are further rows of the code; TopK and BatchTopK have one per row."""
    assert context.k is not None
    share, n_rows = gradients.share, gradients.n_rows
    sizes = prefixes(share.n_latents(sae.d_sae)) if kin.nested else [sae.d_sae]
    n_nested = len(sizes)
    z_BD, t_BE = _ends(sae, x_BD, y_BE, share)
    encoder = Encoder(z_BD, sae.W_enc, sae.b_enc, gradients.bf16)
    code, h_N = share.topk(encoder, context.k) if kin.of_rows else share.batch_topk(encoder, context.k, guess)
    acts_N = torch.relu(h_N)
    weight = 2 / (n_rows * n_nested * gradients.variance)  # dLoss/dx̂ is this times the error
    if n_nested == 1:
        nested, error_BE = code, (yield share.written(code.decode(acts_N, sae.W_dec).sub_(t_BE)))
        later_RE = sum_BE = error_BE
        total = squared_B = error_BE.norm(dim=1).square()
    else:
        first = share.first_latent(sae.d_sae)
        nested = code.split([0, *(size - first for size in sizes[:-1])])
        x_hat_BSE = nested.decode(acts_N, sae.W_dec).view(len(x_BD), n_nested, -1).cumsum(1)
        error_BSE = yield share.written(x_hat_BSE.sub_(t_BE[:, None]))
        later_BSE = error_BSE.flip(1).cumsum(1).flip(1)  # a latent is part of all nested SAEs from its own on
        later_RE, sum_BE, error_BE = later_BSE.flatten(0, 1), later_BSE[:, 0], error_BSE[:, -1]
        total = error_BSE.norm(dim=2).square()
        squared_B = total[:, -1]
    dh_N = nested.products(later_RE, sae.W_dec).mul_((acts_N > 0) * weight)
    gradients.add("W_dec", nested.accumulate(acts_N * weight, later_RE))
    gradients.along_F = code.sum_latents(acts_N * dh_N)
    gradients.add("b_enc", _others(sae, code, dh_N, z_BD, sum_BE, weight, gradients))
    gradients.squared_errors.append(squared_B)
    gradients.fires_F = code.sum_latents((acts_N > 0).to(acts_N.dtype))
    infinity = acts_N.new_full((1,), torch.inf)
    gradients.least_active = torch.cat([torch.where(acts_N > 0, acts_N, infinity), infinity]).min()
    gradients.auxiliary = torch.zeros_like(gradients.variance)
    if n_dead := share.count(len(context.dead)):
        gradients.auxiliary = _auxiliary(sae, z_BD, error_BE, context.dead, n_dead, gradients)
    gradients.auxiliary = share.once(gradients.auxiliary)
    total = share.once(total.sum()) / (n_rows * n_nested)
    gradients.total = (total + AUX_WEIGHT * gradients.auxiliary) / gradients.variance


def _auxiliary(
    sae: ReLUSAE,
    z_BD: Tensor,
    error_BE: Tensor,
    dead: Int[Tensor, " here"],
    n_dead: int,
    gradients: Gradients,
) -> Tensor:
    """AuxK: the dead latents' own small SAE, asked for -error. Adds to the gradients; returns mean squared error.

    `n_dead` are dead in all, and `dead` those of this process.
    """
    share = gradients.share
    W_enc, W_dec, b_enc = sae.W_enc[:, dead], sae.W_dec[dead], sae.b_enc[dead]
    k = min(sae.d_in // 2, n_dead)
    encoder = Encoder(z_BD, W_enc, b_enc, gradients.bf16)
    code: Code
    if n_dead < _SPARSE_AUX * k and share.n_latents(1) == 1:
        code, acts = DenseCode(), topk_relu(encoder.dense(), k)
    else:
        code, values = share.topk(encoder, k)
        acts = torch.relu(values)
    aux_error_BE = share.written(code.decode(acts, W_dec)) + error_BE
    auxiliary = aux_error_BE.norm().square() / gradients.n_rows
    if len(dead) == 0:
        return auxiliary
    weight = 2 * (AUX_WEIGHT / gradients.variance) / gradients.n_rows
    dh = code.products(aux_error_BE, W_dec).mul_((acts > 0) * weight)
    sums = code.sum_latents(dh)
    gradients.of["W_dec"].index_add_(0, dead, code.accumulate(acts * weight, aux_error_BE))
    assert gradients.along_F is not None
    gradients.along_F.index_add_(0, dead, code.sum_latents(acts * dh))
    gradients.of["W_enc"].index_add_(0, dead, code.accumulate(dh, z_BD))
    gradients.of["b_enc"].index_add_(0, dead, sums)
    if sae.tied:
        gradients.of["b_dec"] -= W_enc @ sums
    return auxiliary
