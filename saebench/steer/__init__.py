"""Steering: interventions on latents, generation under them with controls, and what they do at which strength."""

from saebench.steer.generate import Generation, Sampling, Text, arms_of, generate, stream
from saebench.steer.interventions import Intervention, Units, Where, mask_of, steered, units_of
from saebench.steer.run import Bench, open_bench

__all__ = [
    "Bench",
    "Generation",
    "Intervention",
    "Sampling",
    "Text",
    "Units",
    "Where",
    "arms_of",
    "generate",
    "mask_of",
    "open_bench",
    "steered",
    "stream",
    "units_of",
]
