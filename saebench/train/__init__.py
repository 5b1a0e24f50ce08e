"""Train a grid of SAEs off one shuffled stream of stored activations."""

from saebench.train.loop import TrainConfig, grid, train
from saebench.train.member import Member, Spec

__all__ = ["Member", "Spec", "TrainConfig", "grid", "train"]
