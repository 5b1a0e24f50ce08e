"""The embedded default: a model to look into, and the pipeline run on it."""
