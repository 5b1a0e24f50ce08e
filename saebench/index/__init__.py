"""Feature indexes: every latent's evidence in one pass over a store."""

from saebench.index.build import build_index
from saebench.index.plan import IndexConfig
from saebench.index.reader import FeatureIndex, open_feature_index

__all__ = ["FeatureIndex", "IndexConfig", "build_index", "open_feature_index"]
