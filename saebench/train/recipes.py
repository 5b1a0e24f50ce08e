"""How each architecture is trained: a row is all that is particular to one, beside the functions that it names.

What an SAE reads and writes is no part of it.
"""

from typing import TYPE_CHECKING, Literal, NamedTuple

from saebench.sae import SAE, GatedSAE, JumpReLUSAE, ReLUSAE, TopKSAE
from saebench.train import gradients, objectives
from saebench.train.gradients import Kin, Penalised
from saebench.train.objectives import Objective


class Edition(NamedTuple):
    """How weights move, whatever the architecture (decisions 39 and 45)."""

    beta1: float
    """of Adam"""
    beta2: float
    decoder: float
    """learning rate of W_dec, relative to that of the encoder"""
    shrink: float
    """weight decay of W_enc at the first step, as a share of its learning rate; it falls linearly to 0"""
    rate: float
    """learning rate where none is said, over `default_learning_rate`"""
    crowded: float
    """where there are more than 8 latents to a dimension, power of 8D/F that it is multiplied by"""
    decay: float
    """share of the steps in which it falls, where none is said"""
    dead: int
    """what part of the run a latent is silent for when AuxK takes it for dead, where nothing is said"""
    muon: bool = False
    """whether W_enc moves by `step_by_muon`, and not by Adam as all else"""


EDITIONS = {
    1: Edition(0.9, 0.999, decoder=1.0, shrink=0.0, rate=1.0, crowded=0.0, decay=0.2, dead=20),
    2: Edition(0.8, 0.95, decoder=2.0, shrink=2.0, rate=2.0, crowded=0.25, decay=0.8, dead=60),
    3: Edition(0.8, 0.95, decoder=2.0, shrink=0.5, rate=2.0, crowded=0.25, decay=0.8, dead=60, muon=True),
}
"""What is begun now has that of its recipe; what was begun with another goes on with it."""


class Recipe(NamedTuple):
    """A row of the table."""

    sae: type[SAE]
    """what is trained and saved; its own names are those on disk (BatchTopK's inference form is JumpReLU)"""
    takes_k: bool
    """sparsity is a number of latents, not a coefficient; dead latents are then revived by AuxK, else by resampling"""
    unit_rows: bool
    """decoder rows are kept at norm 1 throughout"""
    gains: tuple[float, float]
    """norms of decoder rows and encoder columns at the start, as powers of 2D/F (`initialise`)"""
    momentum: bool
    """whether Adam's first moment is a mean over steps (`Edition.beta1`)"""
    edition: int
    """the row of `EDITIONS`"""
    objective: Objective
    gradients: Penalised | Kin
    """those of the objective, as `exact_gradients` takes them"""


RESAMPLED = 20
"""what part of the run lies between two resamplings, and a latent is silent for that is resampled"""

RECIPES = {
    "relu": Recipe(
        ReLUSAE, takes_k=False, unit_rows=False, gains=(0.5, 0.5), momentum=True, edition=2,
        objective=objectives.relu_objective, gradients=gradients.add_relu,
    ),
    "topk": Recipe(
        TopKSAE, takes_k=True, unit_rows=True, gains=(0.0, 0.0), momentum=True, edition=3,
        objective=objectives.topk_objective, gradients=Kin(of_rows=True),
    ),
    "gated": Recipe(
        GatedSAE, takes_k=False, unit_rows=True, gains=(0.0, 1.0), momentum=False, edition=2,
        objective=objectives.gated_objective, gradients=gradients.add_gated,
    ),
    "batchtopk": Recipe(
        JumpReLUSAE, takes_k=True, unit_rows=True, gains=(0.0, 0.0), momentum=True, edition=2,
        objective=objectives.batchtopk_objective, gradients=Kin(),
    ),
    "jumprelu": Recipe(
        JumpReLUSAE, takes_k=False, unit_rows=False, gains=(0.5, 0.5), momentum=False, edition=1,
        objective=objectives.jumprelu_objective, gradients=gradients.add_jumprelu,
    ),
    "matryoshka": Recipe(
        JumpReLUSAE, takes_k=True, unit_rows=True, gains=(0.0, 0.0), momentum=True, edition=2,
        objective=objectives.matryoshka_objective, gradients=Kin(nested=True),
    ),
}  # fmt: skip
if TYPE_CHECKING:
    Architecture = str
else:
    Architecture = Literal[tuple(RECIPES)]  # the choices of the command line are the names of the table
