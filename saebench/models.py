"""Language models: load, capture residual-stream vectors, splice a replacement in.

The only module that imports transformer_lens. Hook names are TransformerLens' own
(`blocks.{layer}.hook_resid_post`); a bridge keeps the numerics of the Hugging Face model it wraps.

B contexts in the batch, L positions, D d_model, V vocabulary.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor

from saebench.files import hash_files

EMBEDDED_MODEL = "embedded"
EMBEDDED_MODEL_PATH = Path(__file__).parent / "demo" / "model"

HookKind = Literal["resid_pre", "resid_post", "mlp_out", "attn_out"]
ModelDtype = Literal["float32", "bfloat16", "float16"]
HOOK = re.compile(r"blocks\.(\d+)\.hook_(resid_pre|resid_post|mlp_out|attn_out)")
"""The hooks that can be harvested and trained on: layer and kind."""
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class LanguageModel:
    """A loaded model. `bridge` is TransformerLens' TransformerBridge; the rest is read once from it."""

    id: str
    bridge: Any
    tokenizer: Any
    weights_hash: str
    tokenizer_files: tuple[Path, ...]
    n_layers: int
    d_model: int
    n_vocab: int
    """rows of the embedding: token ids are below it"""
    max_context: int
    device: torch.device
    dtype: ModelDtype


def choose_device(device: str | None, *, float64: bool = False) -> str:
    """The device asked for, or else CUDA, then MPS, then CPU. Raises ValueError for one that is not at hand.

    With `float64`, in which training and evaluation add up, MPS does not count: it has none.
    """
    mps = torch.backends.mps.is_available() and not float64
    at_hand = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    if device is None:
        return next(name for name, here in at_hand.items() if here)
    if not at_hand.get(device.split(":")[0], False):
        raise ValueError(
            f"device {device!r} is not at hand; expected {' or '.join(n for n, h in at_hand.items() if h)}"
        )
    return device


def default_dtype(device: str) -> ModelDtype:
    """bfloat16 on a GPU that computes in it, else float32."""
    return "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"


def model_path(name: str) -> str:
    """A path or hub id: the name itself, but for the embedded model."""
    return str(EMBEDDED_MODEL_PATH) if name == EMBEDDED_MODEL else name


def load_model(
    name: str,
    *,
    device: str | None = None,
    dtype: ModelDtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a hub model or a local `save_pretrained` directory; `embedded` is the model shipped here.

    Raises ValueError when there is no such model or its architecture is not supported.
    """
    from transformer_lens.model_bridge import TransformerBridge

    device = choose_device(device)
    dtype = dtype or default_dtype(device)
    path = model_path(name)
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise ValueError(
            f"model {name!r} is not a directory; give a folder made by save_pretrained, 'embedded' or a hub id"
        )
    path = str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path
    try:
        bridge = TransformerBridge.boot_transformers(
            path, device=device, dtype=getattr(torch, dtype), revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"model {name!r} cannot be loaded: {_first_line(error)}") from error
    bridge.eval()
    _fuse_attention(bridge)
    folder = _checkpoint_folder(path, revision)
    config, original = bridge.cfg, cast(Any, bridge.original_model)
    return LanguageModel(
        id=name,
        bridge=bridge,
        tokenizer=bridge.tokenizer,
        weights_hash=hash_files(sorted(file for pattern in _WEIGHT_PATTERNS for file in folder.glob(pattern))),
        tokenizer_files=tuple(sorted(file for file in folder.iterdir() if _is_tokenizer_file(file.name))),
        n_layers=config.n_layers,
        d_model=config.d_model,
        n_vocab=original.get_input_embeddings().weight.shape[0],
        max_context=config.n_ctx,
        device=torch.device(device),
        dtype=dtype,
    )


def _fuse_attention(bridge: Any) -> None:
    """Let attention run in the Hugging Face module's own code and in one kernel, where the family has that.

    A bridge computes attention step by step, so that scores and patterns have hooks; it then takes a third
    longer than the module that it wraps. Nothing here looks inside attention: its input and output keep their hooks.
    """
    from transformer_lens.model_bridge import generalized_components as components

    stepwise = {
        components.JointQKVAttentionBridge,
        components.PositionEmbeddingsAttentionBridge,
        components.JointQKVPositionEmbeddingsAttentionBridge,
    }
    attentions = [getattr(block, "attn", None) for block in getattr(bridge, "blocks", ())]
    if not {type(attention) for attention in attentions} <= stepwise:
        return
    try:
        bridge.original_model.set_attn_implementation("sdpa")
    except ValueError:  # no fused kernel computes what this family does, for instance where scores are capped
        return
    for attention in attentions:
        # Past `setattr`, with which a bridge writes through to the module that it wraps.
        vars(attention)["forward"] = components.AttentionBridge.forward.__get__(attention)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model alone. Raises ValueError where it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_path(name))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"the tokenizer of model {name!r} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _checkpoint_folder(path: str, revision: str | None) -> Path:
    """Where the files of a loaded model lie: the folder given, or the hub's local snapshot."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(path, revision=revision, allow_patterns=["*.json", "*.txt", "*.model"], local_files_only=True)
    )


def _is_tokenizer_file(name: str) -> bool:
    return name.startswith(
        ("tokenizer", "vocab", "merges", "special_tokens_map", "added_tokens", "spiece", "chat_template")
    )


# ----------------------------------------------------------------------------------------- hooks


def hook_name(layer: int, kind: HookKind = "resid_post") -> str:
    return f"blocks.{layer}.hook_{kind}"


def check_hook(model: LanguageModel, hook: str) -> None:
    """Raises ValueError unless `hook` names a residual-stream position of this model."""
    match = HOOK.fullmatch(hook)
    if match is None:
        raise ValueError(
            f"hook {hook!r} is not known; expected blocks.LAYER.hook_KIND with KIND one of resid_pre, resid_post, mlp_out, attn_out"
        )
    if int(match[1]) >= model.n_layers:
        raise ValueError(f"hook {hook!r} is beyond model {model.id!r}, whose layers are 0 to {model.n_layers - 1}")


class _AllCaptured(Exception):
    """Ends a forward pass once the last hook wanted has fired."""


def capturer(
    model: LanguageModel, hooks: Sequence[str]
) -> Callable[[Int[Tensor, "B L"], Callable[[str, Tensor], None]], None]:
    """A forward pass, to be run many times, that hands each vector wanted to a function and ends after the deepest.

    The function gets the hook's name and a tensor `[B, L, D]` in the model's dtype, which later layers may write over.
    Finds the hooks once, and keeps no keys and values: neither is free beside a small model or on a fast machine.
    """
    known = model.bridge.hook_dict
    points = {name: known[name] for name in hooks}

    @torch.inference_mode()
    def run(tokens: Int[Tensor, "B L"], take: Callable[[str, Tensor], None]) -> None:
        missing = set(hooks)

        def hook_function(name: str, value: Tensor) -> None:
            take(name, value)
            missing.discard(name)
            if not missing:
                raise _AllCaptured

        handles = [
            point.register_forward_hook(lambda _, args, value, name=name: hook_function(name, value))
            for name, point in points.items()
        ]
        try:
            model.bridge.original_model(tokens, use_cache=False)
        except _AllCaptured:
            return
        finally:
            for handle in handles:
                handle.remove()
        raise ValueError(f"hook {sorted(missing)[0]!r} never fired in model {model.id!r}; it has no such position")

    return run


def capture(
    model: LanguageModel, tokens: Int[Tensor, "B L"], hooks: Sequence[str]
) -> dict[str, Float[Tensor, "B L D"]]:
    """The vectors at `hooks`, from one forward pass that stops after the deepest of them."""
    captured: dict[str, Tensor] = {}
    capturer(model, hooks)(tokens, lambda name, value: captured.update({name: value.clone()}))
    return captured


Edit = Callable[[Tensor], Tensor | None]
"""The new value of a hook, or None for the old one."""
Replace = Callable[[Float[Tensor, "B L D"]], Float[Tensor, "B L D"]]


@torch.inference_mode()
def spliced_logits(
    model: LanguageModel, tokens: Int[Tensor, "B L"], hook: str, replace: Replace
) -> Float[Tensor, "B L V"]:
    """Logits of the model whose vectors at `hook` went through `replace`.

    `replace` sees them in the model's dtype and returns the same shape and dtype.
    """
    with model.bridge.hooks(fwd_hooks=[(hook, lambda value, hook: replace(value))]):
        return model.bridge(tokens, return_type="logits")


def edits(model: LanguageModel, functions: Mapping[str, Edit]) -> Callable[[], AbstractContextManager[None]]:
    """A context manager, to be had many times, under which the vectors at each hook go through its function.

    Finds the hooks once: the bridge's own `hooks` looks through all of them every time, which a pass over one token notices.
    """
    known = model.bridge.hook_dict if functions else {}
    points = {name: known[name] for name in functions}

    @contextlib.contextmanager
    def attached() -> Iterator[None]:
        handles: list[Any] = []
        try:
            for name, function in functions.items():
                handles.append(points[name].register_forward_hook(lambda _, args, value, f=function: f(value)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    return attached


@torch.inference_mode()
def next_logits(
    model: LanguageModel,
    tokens: Int[Tensor, "B L"],
    *,
    cache: Any = None,
    padding: Int[Tensor, " B"] | None = None,
    keep: int = 1,
    use_cache: bool = True,
) -> tuple[Float[Tensor, "B keep V"], Any]:
    """(logits after the last `keep` tokens, KV cache) of texts of which `cache` holds the beginning.

    `padding` counts the columns before each text's first token, cached ones included.
    """
    seen = 0 if cache is None else cache.get_seq_length()
    extra = {}
    if padding is not None:
        columns = torch.arange(seen + tokens.shape[1], device=tokens.device)
        places = columns - padding[:, None]
        extra = {"attention_mask": (places >= 0).long(), "position_ids": places[:, seen:].clamp(min=0)}
    output = model.bridge.original_model(
        tokens, past_key_values=cache, use_cache=use_cache, logits_to_keep=keep, **extra
    )
    return output.logits, output.past_key_values


# ----------------------------------------------------------------------------------------- output


class Unembedding(NamedTuple):
    """What leads from the residual stream to the logits, but for the final norm's division by its scale."""

    W_U: Float[Tensor, "D V"]
    gamma: Float[Tensor, " D"]
    """the final norm's weight"""
    centred: bool
    """whether the final norm takes off the mean first (LayerNorm)"""

    def effects(self, directions: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Logits of directions at a final-norm scale of 1, biases left out."""
        if self.centred:
            directions = directions - directions.mean(1, keepdim=True)
        return (directions * self.gamma) @ self.W_U.float()


@torch.no_grad()
def unembedding(model: LanguageModel) -> Unembedding:
    """The unembedding, `W_U` in the model's dtype. The final norm is asked rather than read, since families keep its weight differently.

    Raises ValueError for a model that has no final norm.
    """
    if not hasattr(model.bridge, "ln_final"):
        raise ValueError(
            f"model {model.id!r} has no final norm; its logit effects are not known: index with --no-logits"
        )
    norm = model.bridge.ln_final
    sign_D = torch.ones(model.d_model, device=model.device, dtype=getattr(torch, model.dtype))
    sign_D[::2] = -1.0
    outputs = [norm(x_D[None, None]).float()[0, 0] for x_D in (sign_D, -sign_D, sign_D + 3.0)]
    gamma_D = (outputs[0] - outputs[1]) / 2 * sign_D.float()
    centred = torch.allclose(outputs[2], outputs[0], rtol=1e-2, atol=1e-3)
    return Unembedding(model.bridge.W_U, gamma_D, centred)
