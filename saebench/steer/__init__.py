"""Steering: interventions on latents, generation under them with controls, and what they do at which strength."""

from saebench.steer.bench import Bench, bench_with, open_bench
from saebench.steer.generate import Generation, Sampling, Text, arms_of, generate, stream
from saebench.steer.interventions import Intervention, Units, Where, mask_of, steered, units_of

__all__ = [
    "Bench",
    "Generation",
    "Intervention",
    "Sampling",
    "Text",
    "Units",
    "Where",
    "arms_of",
    "bench_with",
    "generate",
    "mask_of",
    "open_bench",
    "steered",
    "stream",
    "units_of",
]
