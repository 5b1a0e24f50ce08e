"""Activation stores on disk: the only room that imports h5py for activations.

The format is specified in `activations/README.md`.
"""

from saebench.store.reader import Store, open_store
from saebench.store.shard import Damaged, Shard
from saebench.store.shard_writer import ShardWriter
from saebench.store.shuffle import Cursor, Partition, joint_batches, shuffled_batches
from saebench.store.writer import StoreWriter

__all__ = [
    "Cursor",
    "Damaged",
    "Partition",
    "Shard",
    "ShardWriter",
    "Store",
    "StoreWriter",
    "joint_batches",
    "open_store",
    "shuffled_batches",
]
