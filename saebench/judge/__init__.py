"""A judge for latents: a language model that says what they fire on, and is held to it on texts it has not seen."""

from saebench.judge.run import ExplainConfig, explain

__all__ = ["ExplainConfig", "explain"]
