"""Train a grid of SAEs off one shuffled stream of stored activations."""

from saebench.train.loop import train
from saebench.train.member import Member, Spec
from saebench.train.settings import TrainConfig, grid

__all__ = ["Member", "Spec", "TrainConfig", "grid", "train"]
