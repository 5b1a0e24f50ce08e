"""Interactions: which tokens a scalar of the model needs together, and which in place of each other."""
