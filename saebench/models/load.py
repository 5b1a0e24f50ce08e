"""From a name to a language model: the Hugging Face module as it is, its tokenizer, and what both say of themselves."""

import contextlib
import logging
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saebench.files import first_line, hash_files
from saebench.models.devices import ALL, Memory, ModelDtype, choose_device, default_dtype, device_of, placed
from saebench.models.files import checkpoint_folder, path_of, tokenizer_of, weight_files
from saebench.pieces import TokenBytes
from saebench.text import Encoder, encoder_of

log = logging.getLogger(__name__)

UNLIMITED = 2**31 - 1
"""the context of a model that knows no longest one"""
_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")


@dataclass
class Passing:
    """What a model's forward passes were given, and give."""

    ids: Tensor | None = None
    """`[B, L]` of the one under way, or the last"""
    output: type = tuple
    """what the module without its head returns"""


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A loaded model: `module` is the Hugging Face one, which runs as it does without us; the rest is read once from it."""

    id: str
    module: Any
    tokenizer: Any
    """None where the model came without: it then takes token ids alone"""
    encoder: Encoder
    """how it reads text"""
    folder: Path
    """where its files lie"""
    weights_hash: str
    tokenizer_files: tuple[Path, ...]
    base: Any
    """the part of `module` that makes the vectors of which its own forward makes logits"""
    blocks: tuple[nn.Module, ...]
    """one for each layer, in order"""
    d_model: int
    n_vocab: int
    """rows of the embedding: token ids are below it"""
    max_context: int
    end_tokens: frozenset[int]
    """each of them ends a text"""
    device: torch.device
    """of tokens, of vectors at hooks and of logits; of all weights, unless the model lies on several"""
    dtype: ModelDtype
    passing: Passing = field(default_factory=Passing)
    checked: dict[str, str | None] = field(default_factory=dict)
    """what was tried on it, with what is wrong, or None"""

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @cached_property
    def pieces(self) -> TokenBytes:
        """What each token stands for."""
        return TokenBytes(self.tokenizer)

    @cached_property
    def _former_hash(self) -> str:
        return hash_files(sorted([*self.folder.glob("*.safetensors"), *self.folder.glob("*.bin")]))

    def hash_like(self, recorded: str | None) -> str:
        """`weights_hash`; or what was recorded, if it is the hash of the first versions, for which every *.bin file was weights."""
        if recorded in (None, self.weights_hash) or recorded != self._former_hash:
            return self.weights_hash
        return recorded

    def tokens_of(self, text: str) -> list[int]:
        """Token ids of a text as contexts have them: BOS first, once.

        Raises ValueError where there are none or too many of them, for one beyond the embedding, and for a model without tokenizer.
        """
        ids = self.encoder.opened(self.encoder.encode([text])[0])
        if len(ids) == 1:
            raise ValueError("the text is empty; expected at least one token")
        if len(ids) > self.max_context:
            raise ValueError(f"the text has {len(ids)} tokens; the model takes at most {self.max_context}")
        self.check_tokens(ids)
        return ids

    def check_tokens(self, ids: list[int]) -> None:
        """Raises ValueError naming the first token that the model's embedding does not have."""
        for token in ids:
            if not 0 <= token < self.n_vocab:
                said = "" if self.tokenizer is None else f" ({self.tokenizer.convert_ids_to_tokens(token)!r})"
                raise ValueError(
                    f"the text has token {token}{said}, model {self.id!r} knows 0 to {self.n_vocab - 1}: it was added to the "
                    "tokenizer, and not to the model. Leave it out of the text, or resize the model's embedding"
                )


def load_model(
    name: str,
    *,
    device: str | None = None,
    dtype: ModelDtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    max_memory: Memory | None = None,
) -> LanguageModel:
    """Load a hub model or a local `save_pretrained` directory; `embedded` is the model shipped here.

    Device `all` is for a model that is too large for one GPU: accelerate lays its layers over all of them, within `max_memory` if given.
    No process is started for it, nothing is installed, and of a folder nothing is downloaded. Raises ValueError when there is
    no such model, its weights are not all there, or it is not what `check_model` expects.
    """
    from saebench.models.checks import check_model  # which runs it

    spread = device == ALL
    device = choose_device(None if spread else device)
    dtype = dtype or default_dtype(device)
    layout = {"device_map": "auto", "max_memory": max_memory and dict(max_memory)} if spread else {}
    path = path_of(name)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _silent():
        module = _load_module(name, path, dtype, options, layout)
        tokenizer, tokenizer_files = tokenizer_of(name, path, options)
        folder = checkpoint_folder(path, revision)
    placed(module, name, ALL if spread else device)
    module.eval().requires_grad_(False)  # gradients are asked of vectors alone
    n_vocab = module.get_input_embeddings().weight.shape[0]
    if tokenizer is not None and tokenizer.vocab_size > n_vocab:
        raise ValueError(
            f"the tokenizer of model {name!r} has {tokenizer.vocab_size} tokens, its embedding {n_vocab} rows: "
            "it is the tokenizer of another model; put the model's own files beside its weights"
        )
    model = _described(
        module,
        id=name,
        tokenizer=tokenizer,
        folder=folder,
        weights_hash=hash_files(weight_files(folder)),
        tokenizer_files=tokenizer_files,
        dtype=dtype,
    )
    _note_ids(model)
    check_model(model)
    return model


def _described(module: Any, *, id: str, tokenizer: Any, **known: Any) -> LanguageModel:
    """A model with what is read from its module."""
    text_config = module.config.get_text_config(decoder=True)
    blocks = _blocks(id, module, text_config.num_hidden_layers)
    device = device_of(module)
    return LanguageModel(
        id=id,
        module=module,
        tokenizer=tokenizer,
        encoder=encoder_of(tokenizer),
        base=_base(id, module, blocks[0], device),
        blocks=blocks,
        d_model=text_config.hidden_size,
        n_vocab=module.get_input_embeddings().weight.shape[0],
        max_context=next(
            (value for key in _CONTEXT_FIELDS if isinstance(value := getattr(text_config, key, None), int)), UNLIMITED
        ),
        end_tokens=_end_tokens(module, tokenizer),
        device=device,
        **known,
    )


def _note_ids(model: LanguageModel) -> Any:
    """Have a model's passes say which tokens they are given; returns the handle that ends it."""
    embedding = model.module.get_input_embeddings()
    return embedding.register_forward_pre_hook(lambda _, args: setattr(model.passing, "ids", args[0].to(model.device)))


_tried: weakref.WeakKeyDictionary[nn.Module, dict[str, str | None]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def wrapped(module: Any) -> Iterator[LanguageModel]:
    """A Hugging Face module that was loaded elsewhere, as it is and without tokenizer; it is left as it was.

    Raises ValueError where it is not what `check_model` expects (tried once for each module), and for one in training.
    """
    from saebench.models.checks import check_model

    name = type(module).__name__
    if module.training:
        raise ValueError(f"the {name} is in training, where dropout makes each pass another; call its eval() first")
    known = {"folder": Path(), "weights_hash": "", "tokenizer_files": (), "checked": _tried.setdefault(module, {})}
    dtype = str(module.dtype).removeprefix("torch.")
    model = _described(module, id=name, tokenizer=None, dtype=dtype, **known)
    handle = _note_ids(model)
    try:
        if "" not in model.checked:
            check_model(model)
            model.checked[""] = None
        yield model
    finally:
        handle.remove()


def _load_module(name: str, path: str, dtype: ModelDtype, options: dict[str, Any], layout: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMaskedLM

    try:
        config = AutoConfig.from_pretrained(path, **options)
    except Exception as error:  # whatever a library, or code from the hub, makes of other people's files
        raise ValueError(f"model {name!r} cannot be loaded: {first_line(error)}") from error
    architecture = ", ".join(getattr(config, "architectures", None) or [type(config).__name__])
    masked = type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False)
    if config.is_encoder_decoder or (masked and not architecture.endswith(("ForCausalLM", "LMHeadModel"))):
        raise ValueError(f"model {name!r} ({architecture}) is {_NOT_CAUSAL}")
    causal = hasattr(config, "auto_map") or type(config) in AutoModelForCausalLM._model_mapping
    auto: Any = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    if not causal and type(config) not in auto._model_mapping:
        raise ValueError(f"model {name!r} ({architecture}) is {_NOT_CAUSAL}")
    try:
        module, loaded = auto.from_pretrained(
            path, config=config, dtype=getattr(torch, dtype), output_loading_info=True, **options, **layout
        )
    except Exception as error:
        raise ValueError(f"model {name!r} cannot be loaded: {first_line(error)}") from error
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(
            f"model {name!r} lacks {len(missing)} of the weights that {architecture} has, {missing[0]!r} for one: "
            "a part of the checkpoint is missing, or it is of another architecture"
        )
    return module


_NOT_CAUSAL = (
    "no decoder of text from left to right, for which alone loss recovered, logit effects and generation are defined. "
    "Its vectors can be kept in a store with saebench.store.StoreWriter, and SAEs be trained and indexed on them"
)


def _blocks(name: str, module: Any, n_layers: int) -> tuple[nn.Module, ...]:
    """The list of so many modules that lies outermost in the text's part of a model."""
    decoder = module.get_decoder() if hasattr(module, "get_decoder") else module
    for root in (decoder, module):
        for part in root.modules() if isinstance(root, nn.Module) else ():
            if isinstance(part, nn.ModuleList) and len(part) == n_layers:
                return tuple(part)
    raise ValueError(
        f"model {name!r} ({type(module).__name__}) has no list of its {n_layers} layers: its residual stream is not known here"
    )


@torch.inference_mode()
def _base(name: str, module: Any, block: nn.Module, device: torch.device) -> Any:
    """The outermost part around the layers that a pass calls. Raises ValueError where no pass runs."""
    called: list[Any] = []
    around = [part for part in module.modules() if part not in (module, block) and block in part.modules()]
    handles = [part.register_forward_hook(lambda part, *_: called.append(part)) for part in around]
    try:
        module(torch.ones(1, 1, dtype=torch.long, device=device), use_cache=False)
    except Exception as error:
        raise ValueError(f"model {name!r} does not run on token ids alone: {first_line(error)}") from error
    finally:
        for handle in handles:
            handle.remove()
    if not called:
        raise ValueError(
            f"model {name!r} ({type(module).__name__}) does not keep its layers apart from its unembedding"
        )
    return called[-1]


def _end_tokens(module: Any, tokenizer: Any) -> frozenset[int]:
    """Those of the tokenizer, the model's configuration and that of its generation."""
    named = [getattr(getattr(module, part, None), "eos_token_id", None) for part in ("config", "generation_config")]
    named.append(getattr(tokenizer, "eos_token_id", None))
    return frozenset(token for ids in named for token in (ids if isinstance(ids, list) else [ids]) if token is not None)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """No bar of a library for what takes a moment, unless details are asked for; downloads keep theirs."""
    from transformers.utils import logging as library

    shown = library.is_progress_bar_enabled()
    if not log.isEnabledFor(logging.DEBUG):
        library.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            library.enable_progress_bar()
