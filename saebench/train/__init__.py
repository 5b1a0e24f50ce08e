"""Train a grid of SAEs off one shuffled stream of stored activations."""

from saebench.train.loop import train
from saebench.train.member import Member
from saebench.train.settings import TrainConfig, grid
from saebench.train.spec import Spec

__all__ = ["Member", "Spec", "TrainConfig", "grid", "train"]
