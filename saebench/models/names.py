"""Whether two names are of one model: with and without its owner, as a folder, or as TransformerLens calls it."""

from pathlib import PurePath


def same_model(one: str, other: str) -> bool:
    """Whether two names are of one model, as far as names say: `gpt2-small` and `openai-community/gpt2` are, a folder only by its own name."""
    if _bare(one) == _bare(other):
        return True
    from transformer_lens.supported_models import MODEL_ALIASES  # seconds, which equal names do not wait for

    families = ({_bare(official), *map(_bare, aliases)} for official, aliases in MODEL_ALIASES.items())
    return any({_bare(one), _bare(other)} <= family for family in families)


def _bare(name: str) -> str:
    return PurePath(name).name.lower()
