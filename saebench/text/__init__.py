"""Text sources -> documents -> packed token contexts with provenance."""

from saebench.text.packing import SPLITS, Context, Document, Encoder, Split, encoder_of, pack, split_of
from saebench.text.sources import EMBEDDED, TextConfig, fingerprint, open_documents, pinned

__all__ = [
    "EMBEDDED",
    "SPLITS",
    "Context",
    "Document",
    "Encoder",
    "Split",
    "TextConfig",
    "encoder_of",
    "fingerprint",
    "open_documents",
    "pack",
    "pinned",
    "split_of",
]
