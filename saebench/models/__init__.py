"""Language models: load one, find its hooks, take vectors there, put others in their place.

A model is the Hugging Face module, which runs as it does without us. What is assumed of it is tried after loading.
"""

from saebench.models.attach import Edit
from saebench.models.checks import check_hook, check_padding, has_place
from saebench.models.devices import ALL, ModelDtype, choose_device, default_dtype
from saebench.models.files import EMBEDDED_MODEL, EMBEDDED_MODEL_PATH, load_tokenizer, model_path
from saebench.models.lens import Predictions, logit_lens, next_tokens
from saebench.models.load import LanguageModel, load_model
from saebench.models.names import same_model
from saebench.models.passes import (
    MLP,
    capture,
    capturer,
    edits,
    head,
    last_states,
    logits,
    mlps_replaced,
    next_logits,
    repeated,
    spliced_logits,
    usual_positions,
    watched,
)
from saebench.models.places import HOOK, HookKind, depth, hook_name, parse_hook, widths_of
from saebench.models.resume import CleanPass, clean_pass, resumed_states, resumes, spliced_states
from saebench.models.unembedding import Unembedding, unembedding

__all__ = [
    "ALL",
    "EMBEDDED_MODEL",
    "EMBEDDED_MODEL_PATH",
    "HOOK",
    "MLP",
    "CleanPass",
    "Edit",
    "HookKind",
    "LanguageModel",
    "ModelDtype",
    "Predictions",
    "Unembedding",
    "capture",
    "capturer",
    "check_hook",
    "check_padding",
    "choose_device",
    "clean_pass",
    "default_dtype",
    "depth",
    "edits",
    "has_place",
    "head",
    "hook_name",
    "last_states",
    "load_model",
    "load_tokenizer",
    "logit_lens",
    "logits",
    "mlps_replaced",
    "model_path",
    "next_logits",
    "next_tokens",
    "parse_hook",
    "repeated",
    "resumed_states",
    "resumes",
    "same_model",
    "spliced_logits",
    "spliced_states",
    "unembedding",
    "usual_positions",
    "watched",
    "widths_of",
]
