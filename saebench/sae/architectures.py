"""Sparse dictionaries as maths: autoencoders, and those that read here and write there.

Suffixes name shapes: B rows, D d_in, E d_out, F d_sae (latents). Activations multiply from the left:
`x_BD @ W_enc_DF`. Every architecture reads z = x - b_pre and writes ŷ = f W_dec + b_dec (+ z W_skip); they differ
in how the activations f come from z. An SAE writes what it reads: y is x, and b_pre is b_dec.
"""

import math
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

Normalize = Literal["none", "constant_norm_rescale", "layer_norm", "center"]
NOT_OF_LATENTS = ("b_dec", "W_skip")
"""The parameters that have nothing for each latent."""


class Writes(NamedTuple):
    """What a dictionary writes."""

    d_out: int | None = None
    """width, where it is not what is read: that of a transcoder. None: what is read is written, as by an SAE"""
    skip: bool = False
    """whether a linear map of what is read is written, too"""
    parts: tuple[int, ...] = ()
    """widths of the hooks whose vectors, one behind the other, are what is written (default: one hook's)"""


WHAT_IS_READ = Writes()


class SAEOutput(NamedTuple):
    """What every forward pass returns: reconstruction, activations, and the pre-activations that
    decided which latents are active (for Gated, those of the gate)."""

    x_hat: Float[Tensor, "B E"]
    acts: Float[Tensor, "B F"]
    pre: Float[Tensor, "B F"]


class SAE(nn.Module):
    """x̂ = f(x) W_dec + b_dec with W_enc `[D, F]`, W_dec `[F, E]`, b_dec `[E]`, and E = D but for those that `writes` is given for.

    Those are no autoencoders: a transcoder writes other vectors than it reads, and a crosscoder vectors of several hooks.

    `normalize` exists for SAEs that others trained on rescaled inputs: `constant_norm_rescale`
    brings each row to norm √D, `layer_norm` to mean 0 and standard deviation 1, `center` to mean 0; all are undone
    after decoding. SAEs trained here have it folded into their weights (`none`).
    """

    architecture: ClassVar[str]
    saved_as: ClassVar[str]
    """its name on disk, which is SAELens'"""
    takes_k: ClassVar[bool] = False
    """whether it is made with k, the number of active latents per row"""
    mean_D: Tensor
    ends: Any = None
    """the hooks read and written (`Ends`), of one that was loaded and says so"""

    def __init__(self, d_in: int, d_sae: int, normalize: Normalize = "none", writes: Writes = WHAT_IS_READ) -> None:
        super().__init__()
        self.tied = writes.d_out is None
        """whether what is written is what is read"""
        self.d_in, self.d_sae, self.d_out = d_in, d_sae, d_in if writes.d_out is None else writes.d_out
        self.writes, self.parts = writes, writes.parts or (self.d_out,)
        if sum(self.parts) != self.d_out:
            raise ValueError(f"parts are {self.parts}; expected widths that add up to {self.d_out}, what is written")
        if self.tied and writes.skip:
            raise ValueError(
                "skip is True of what writes what it reads, where a linear map is all: use it for a transcoder"
            )
        if not self.tied and normalize != "none":
            raise ValueError(
                f"normalize is {normalize!r} of a transcoder; expected 'none': it cannot be undone in what is written"
            )
        self.normalize: Normalize = normalize
        # Stored latent by latent, as gradients come: `[D, F]` is a view of contiguous `[F, D]`.
        self.W_enc = nn.Parameter(torch.zeros(d_sae, d_in).T)
        self.W_dec = nn.Parameter(torch.zeros(d_sae, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.W_skip = nn.Parameter(torch.zeros(d_in, self.d_out)) if writes.skip else None
        if not self.tied:
            self.register_buffer("mean_D", torch.zeros(d_in), persistent=False)

    @property
    def b_pre(self) -> Float[Tensor, " D"]:
        """What is taken off what is read: b_dec of what writes that, else the data's mean in training and 0 once saved."""
        return self.b_dec if self.tied else self.mean_D

    def forward(self, x_BD: Float[Tensor, "B D"]) -> SAEOutput:
        x_BD, scale, shift = normalized(x_BD, self.normalize)
        acts_BF, pre_BF = self.activations(x_BD)
        return SAEOutput((acts_BF @ self.W_dec + self.base(x_BD)) * scale + shift, acts_BF, pre_BF)

    def encode(self, x_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B F"]:
        """Activations of the latents."""
        return self.activations(normalized(x_BD, self.normalize)[0])[0]

    def decode(self, acts_BF: Float[Tensor, "B F"]) -> Float[Tensor, "B E"]:
        """Reconstruction from activations, but for what W_skip adds to it."""
        return acts_BF @ self.W_dec + self.b_dec

    def base(self, x_BD: Float[Tensor, "B D"]) -> Tensor:
        """What is written where no latent is active: b_dec, `[E]`, or with W_skip z W_skip + b_dec, `[B, E]`."""
        return self.b_dec if self.W_skip is None else (x_BD - self.b_pre) @ self.W_skip + self.b_dec

    @property
    def lengths_FH(self) -> Float[Tensor, "F H"]:
        """The norms of each latent's decoder row at each of the hooks written."""
        return torch.stack([part.norm(dim=1) for part in self.W_dec.split(self.parts, dim=1)], dim=1)

    def activations(self, x_BD: Float[Tensor, "B D"]) -> tuple[Float[Tensor, "B F"], Float[Tensor, "B F"]]:
        """(activations, deciding pre-activations) of normalised inputs."""
        raise NotImplementedError

    def project(self, x_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B F"]:
        """(x - b_pre) W_enc, with the pre-bias taken through W_enc once instead of once per row."""
        return x_BD @ self.W_enc - self.b_pre @ self.W_enc

    def shift_projections(self, by_F: Float[Tensor, " F"]) -> None:
        """Add to (x - b_pre) W_enc, by the biases."""
        raise NotImplementedError

    @torch.no_grad()
    def rescale_latents(self, factor_F: Float[Tensor, " F"]) -> None:
        """Multiply each activation by `factor_F` > 0 and divide its decoder row by it: x̂ stays the same."""
        self.W_dec /= factor_F[:, None]

    @torch.no_grad()
    def rescale_input(self, scale: float) -> None:
        """Turn an SAE of `scale * x` into the same SAE of x, activations and x̂ divided by `scale`."""
        self.b_dec /= scale

    @torch.no_grad()
    def rescale_hooks(self, reads: float | Float[Tensor, " D"], writes: float | Float[Tensor, " E"]) -> None:
        """Turn a dictionary from `reads * x` to `writes * y` into the same from x to y, with the same activations."""
        each = reads[:, None] if isinstance(reads, Tensor) else reads
        self.W_enc *= each
        if self.W_skip is not None:
            self.W_skip *= each
            self.W_skip /= writes
        self.W_dec /= writes
        self.b_dec /= writes
        if not self.tied:
            self.mean_D /= reads

    @torch.no_grad()
    def fold_mean(self) -> None:
        """Take what a dictionary that is not tied takes off its input into its biases."""
        if not self.tied:
            self.shift_projections(-self.b_pre @ self.W_enc)
            if self.W_skip is not None:
                self.b_dec -= self.b_pre @ self.W_skip
            self.mean_D.zero_()


def normalized(x_BD: Tensor, how: Normalize) -> tuple[Tensor, Any, Any]:
    """(rows for the SAE, scale, shift) with `rows * scale + shift` the rows given."""
    if how == "none":
        return x_BD, 1.0, 0.0
    if how == "constant_norm_rescale":
        scale = x_BD.norm(dim=-1, keepdim=True) / math.sqrt(x_BD.shape[-1])
        return x_BD / scale, scale, 0.0
    mean = x_BD.mean(-1, keepdim=True)
    if how == "center":
        return x_BD - mean, 1.0, mean
    std = x_BD.std(-1, keepdim=True)
    return (x_BD - mean) / (std + 1e-5), std, mean


class ReLUSAE(SAE):
    """f = ReLU(z W_enc + b_enc), trained with an L1 penalty weighted by decoder norms.

    Bricken et al. 2023, "Towards Monosemanticity"; Anthropic, "Circuits Updates" April 2024.
    """

    architecture, saved_as = "relu", "standard"

    def __init__(self, d_in: int, d_sae: int, normalize: Normalize = "none", writes: Writes = WHAT_IS_READ) -> None:
        super().__init__(d_in, d_sae, normalize, writes)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))

    def activations(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        pre_BF = self.project(x_BD) + self.b_enc
        return torch.relu(pre_BF), pre_BF

    @torch.no_grad()
    def shift_projections(self, by_F: Tensor) -> None:
        self.b_enc += by_F

    @torch.no_grad()
    def rescale_latents(self, factor_F: Tensor) -> None:
        super().rescale_latents(factor_F)
        self.W_enc *= factor_F
        self.b_enc *= factor_F

    @torch.no_grad()
    def rescale_input(self, scale: float) -> None:
        super().rescale_input(scale)
        self.b_enc /= scale


class TopKSAE(ReLUSAE):
    """f = ReLU(TopK(z W_enc + b_enc)): the k largest pre-activations of each row, negative ones cut to 0.

    Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 2.3.
    """

    architecture = saved_as = "topk"
    takes_k = True

    def __init__(
        self, d_in: int, d_sae: int, k: int | None, normalize: Normalize = "none", writes: Writes = WHAT_IS_READ
    ) -> None:
        super().__init__(d_in, d_sae, normalize, writes)
        if k is None:
            raise ValueError("architecture 'topk' needs k, the number of active latents per row")
        if not 0 < k <= d_sae:
            raise ValueError(f"k is {k}; expected 1 to d_sae = {d_sae}")
        self.k = k

    def activations(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        pre_BF = self.project(x_BD) + self.b_enc
        return topk_relu(pre_BF, self.k), pre_BF


def topk_relu(pre_BF: Float[Tensor, "B F"], k: int) -> Float[Tensor, "B F"]:
    """The k largest of each row, at least 0; zero elsewhere."""
    values_BK, indices_BK = pre_BF.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre_BF).scatter(-1, indices_BK, torch.relu(values_BK))


class GatedSAE(SAE):
    """f = 1[π_gate > 0] ⊙ ReLU(π_mag), π_gate = z W_enc + b_gate, π_mag = (z W_enc) e^{r_mag} + b_mag.

    Rajamanoharan et al. 2024, "Improving Dictionary Learning with Gated Sparse Autoencoders",
    section 3.2 (weights of the two paths tied by r_mag).
    """

    architecture = saved_as = "gated"

    def __init__(self, d_in: int, d_sae: int, normalize: Normalize = "none", writes: Writes = WHAT_IS_READ) -> None:
        super().__init__(d_in, d_sae, normalize, writes)
        self.r_mag = nn.Parameter(torch.zeros(d_sae))
        self.b_mag = nn.Parameter(torch.zeros(d_sae))
        self.b_gate = nn.Parameter(torch.zeros(d_sae))

    def activations(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        h_BF = self.project(x_BD)
        gate_BF = h_BF + self.b_gate
        return (gate_BF > 0) * torch.relu(h_BF * self.r_mag.exp() + self.b_mag), gate_BF

    @torch.no_grad()
    def shift_projections(self, by_F: Tensor) -> None:
        self.b_gate += by_F
        self.b_mag += by_F * self.r_mag.exp()

    @torch.no_grad()
    def rescale_latents(self, factor_F: Tensor) -> None:
        super().rescale_latents(factor_F)
        self.r_mag += factor_F.log()
        self.b_mag *= factor_F

    @torch.no_grad()
    def rescale_input(self, scale: float) -> None:
        super().rescale_input(scale)
        self.b_mag /= scale
        self.b_gate /= scale


class JumpReLUSAE(ReLUSAE):
    """f = h ⊙ 1[h > θ], h = ReLU(z W_enc + b_enc).

    Rajamanoharan et al. 2024, "Jumping Ahead", section 3; also the inference form of BatchTopK.
    """

    architecture = saved_as = "jumprelu"

    def __init__(self, d_in: int, d_sae: int, normalize: Normalize = "none", writes: Writes = WHAT_IS_READ) -> None:
        super().__init__(d_in, d_sae, normalize, writes)
        self.threshold = nn.Parameter(torch.zeros(d_sae))

    def activations(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        pre_BF = self.project(x_BD) + self.b_enc
        return torch.relu(pre_BF) * (pre_BF > self.threshold), pre_BF

    @torch.no_grad()
    def rescale_latents(self, factor_F: Tensor) -> None:
        super().rescale_latents(factor_F)
        self.threshold *= factor_F

    @torch.no_grad()
    def rescale_input(self, scale: float) -> None:
        super().rescale_input(scale)
        self.threshold /= scale


ARCHITECTURES: dict[str, type[SAE]] = {cls.architecture: cls for cls in (ReLUSAE, TopKSAE, GatedSAE, JumpReLUSAE)}


def new_sae(
    architecture: str,
    d_in: int,
    d_sae: int,
    *,
    k: int | None = None,
    normalize: Normalize = "none",
    writes: Writes = WHAT_IS_READ,
) -> SAE:
    """An SAE, or what writes elsewhere, with zero weights. Raises ValueError for an unknown architecture or an impossible k."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r} is not one of {', '.join(ARCHITECTURES)}")
    chosen = ARCHITECTURES[architecture]
    return chosen(d_in, d_sae, normalize=normalize, writes=writes, **({"k": k} if chosen.takes_k else {}))


@torch.no_grad()
def initialise(
    sae: SAE,
    mean_D: Float[Tensor, " D"],
    generator: torch.Generator,
    gains: tuple[float, float] = (0.0, 0.0),
    mean_E: Float[Tensor, " E"] | None = None,
) -> None:
    """Random decoder directions, encoder tied to them, b_pre and b_dec at the data's means, biases and W_skip zero.

    Decoder rows and encoder columns have the norms (2D/F)^`gains`: 1 as TopK begins (Gao et al. 2024, appendix A.1),
    √(2D/F) where half of all latents are active at first, whose unit rows would add up to many times the input.
    Inputs are scaled to E‖x‖² = D. What writes other vectors, of mean `mean_E`, has random encoder directions.
    """
    W_dec = _directions(sae.d_sae, sae.d_out, generator)
    W_enc = W_dec if sae.tied else _directions(sae.d_sae, sae.d_in, generator)
    sae.W_dec.copy_(W_dec * (2 * sae.d_out / sae.d_sae) ** gains[0])
    sae.W_enc.copy_(W_enc.T * (2 * sae.d_in / sae.d_sae) ** gains[1])
    sae.b_pre.copy_(mean_D)
    if not sae.tied:
        assert mean_E is not None
        sae.b_dec.copy_(mean_E)


def _directions(n: int, width: int, generator: torch.Generator) -> Tensor:
    rows = torch.randn(n, width, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    return rows
