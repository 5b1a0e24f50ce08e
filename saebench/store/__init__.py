"""Activation stores on disk: the only room that imports h5py for activations.

The format is specified in `activations/README.md`.
"""

from saebench.store.reader import Damaged, Shard, Store, open_store
from saebench.store.shuffle import Cursor, shuffled_batches
from saebench.store.writer import ShardWriter, StoreWriter

__all__ = ["Cursor", "Damaged", "Shard", "ShardWriter", "Store", "StoreWriter", "open_store", "shuffled_batches"]
