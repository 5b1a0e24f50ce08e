"""saebench: a workbench for sparse autoencoders on language models."""

__version__ = "0.2.0"
