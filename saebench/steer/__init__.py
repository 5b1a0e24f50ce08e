"""Steering: interventions on latents, generation under them with controls, and what they do at which strength."""

from saebench.steer.bench import Bench, bench_with, open_bench
from saebench.steer.editor import steered
from saebench.steer.generate import Generation, Sampling, Text, arms_of, generate, stream
from saebench.steer.interventions import Intervention, Where, mask_of
from saebench.steer.turns import Turn, interventions, parse_turns
from saebench.steer.units import Units, units_of

__all__ = [
    "Bench",
    "Generation",
    "Intervention",
    "Sampling",
    "Text",
    "Turn",
    "Units",
    "Where",
    "arms_of",
    "bench_with",
    "generate",
    "interventions",
    "mask_of",
    "open_bench",
    "parse_turns",
    "steered",
    "stream",
    "units_of",
]
