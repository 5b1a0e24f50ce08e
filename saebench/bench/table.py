"""A row for each bench."""

from collections.abc import Callable
from typing import Any, NamedTuple

from saebench.bench.absorption import AbsorptionConfig, absorption
from saebench.bench.detection import PythonConfig, bench_python
from saebench.bench.ground_truth import SyntheticConfig, bench_synthetic
from saebench.bench.probes import ProbesConfig, probes
from saebench.bench.results import Figure
from saebench.bench.stability import StabilityConfig, stability


class Bench(NamedTuple):
    """A row of the table: `saebench bench NAME`."""

    config: type
    run: Callable[[Any], list[Figure]]
    """from the settings to the figures worth a table; all of them are in RUN/bench/NAME.json, a unit at a time"""
    about: str


BENCHES: dict[str, Bench] = {
    "synthetic": Bench(
        SyntheticConfig, bench_synthetic, "train on data with known features, and count what is recovered"
    ),
    "python": Bench(PythonConfig, bench_python, "whether single latents are what a parser says of tokens"),
    "probes": Bench(ProbesConfig, probes, "how well concepts are read off few latents, beside what needs no SAE"),
    "absorption": Bench(
        AbsorptionConfig, absorption, "how often latents of something narrower stand in for a concept's own"
    ),
    "stability": Bench(StabilityConfig, stability, "whether SAEs that differ in seed alone find the same latents"),
}
