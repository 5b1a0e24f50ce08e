"""Harvest: text -> contexts -> one truncated forward pass -> an activation store.

Contexts are dealt into shards of one split each, in an order that the text alone decides, and every
shard is run in batches that begin at its first context. A harvest that was killed, or that several
processes share, therefore ends with the same bytes as one that was not.
"""

from saebench.harvest.extend import ExtendConfig, extend
from saebench.harvest.plan import deal
from saebench.harvest.run import harvest
from saebench.harvest.settings import HarvestConfig

__all__ = ["ExtendConfig", "HarvestConfig", "deal", "extend", "harvest"]
