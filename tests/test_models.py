import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LAYERS, SHAPES, VOCABULARY, WIDTH
from families import FAMILIES
from safetensors.torch import load_file, save_file
from test_harvest import config, text
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaModel

from saebench.evaluate import EvalConfig, evaluate
from saebench.files import hash_files, read_json, write_json
from saebench.harvest import ExtendConfig, extend, harvest
from saebench.index import IndexConfig, build_index
from saebench.models import (
    EMBEDDED_MODEL_PATH,
    HookKind,
    LanguageModel,
    capture,
    capturer,
    check_hook,
    choose_device,
    clean_pass,
    edits,
    head,
    hook_name,
    load_model,
    logit_lens,
    logits,
    mlps_replaced,
    model_path,
    next_tokens,
    resumed_states,
    resumes,
    spliced_logits,
    spliced_states,
    usual_positions,
)
from saebench.models.places import KINDS, parse_hook, transformer_lens_paths
from saebench.steer import Sampling, arms_of, generate, open_bench
from saebench.store.schema import MANIFEST
from saebench.store.source import model_of
from saebench.train import TrainConfig, train

TOKENS = torch.randint(1, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> tuple[LanguageModel, torch.nn.Module]:
    """A model as loaded here and by Hugging Face."""
    path = checkpoints[request.param]
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return load_model(str(path), device="cpu", dtype="float32"), reference


def test_residual_stream_equals_hugging_face_hidden_states(pair: tuple[LanguageModel, torch.nn.Module]) -> None:
    model, reference = pair
    with torch.no_grad():
        want = reference(TOKENS, output_hidden_states=True)
    pre = capture(model, TOKENS, [hook_name(i, "resid_pre") for i in range(LAYERS)])
    post = capture(model, TOKENS, [hook_name(i) for i in range(LAYERS)])
    for layer in range(LAYERS):
        assert torch.allclose(pre[hook_name(layer, "resid_pre")], want.hidden_states[layer], atol=1e-4, rtol=1e-4)
    for layer in range(LAYERS - 1):  # the last of Hugging Face's states comes after the final norm
        assert torch.allclose(post[hook_name(layer)], want.hidden_states[layer + 1], atol=1e-4, rtol=1e-4)
    assert torch.equal(spliced_logits(model, TOKENS, hook_name(1), lambda x: x), want.logits)


def test_the_model_runs_as_it_does_without_us(pair: tuple[LanguageModel, torch.nn.Module]) -> None:
    """To the last bit, with the attention that Hugging Face chooses."""
    model, reference = pair
    assert model.module.config._attn_implementation == reference.config._attn_implementation
    with torch.inference_mode():
        want = reference(TOKENS, output_hidden_states=True).hidden_states
    got = capture(model, TOKENS, [hook_name(i) for i in range(LAYERS - 1)])
    assert all(torch.equal(got[hook_name(i)], want[i + 1]) for i in range(LAYERS - 1))


def test_vectors_handed_out_are_those_of_the_named_hooks(pair: tuple[LanguageModel, torch.nn.Module]) -> None:
    model, _ = pair
    names = [hook_name(layer, kind) for layer in range(LAYERS) for kind in KINDS]
    want: dict[str, torch.Tensor] = {}
    with torch.inference_mode(), edits(model, {name: keeps(want, name) for name in names})():
        logits(model, TOKENS)
    run = capturer(model, names)
    for _ in range(2):  # a second pass finds nothing of the first
        got: dict[str, torch.Tensor] = {}
        run(TOKENS, lambda name, value, got=got: got.update({name: value.clone()}))
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in names)


def keeps(kept: dict[str, torch.Tensor], name: str) -> Callable[[torch.Tensor], None]:
    return lambda value: kept.update({name: value.clone()})


def mlp_of(block: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """A block's own way from `mlp_in` to `mlp_out`, of vectors `[N, D]`."""
    parts: Any = block
    behind = getattr(parts, "post_feedforward_layernorm", torch.nn.Identity())
    return lambda x_ND: behind.forward(parts.mlp.forward(x_ND))


@pytest.mark.parametrize(
    ("family", "norm"), [("llama", "post_attention_layernorm"), ("gemma2", "pre_feedforward_layernorm")]
)
def test_what_stands_in_for_an_mlp_may_read_what_comes_before_its_norm_or_the_gain(
    checkpoints: dict[str, Path], family: str, norm: str
) -> None:
    model = load_model(str(checkpoints[family]), device="cpu", dtype="float32")
    where = torch.rand(TOKENS.shape, generator=torch.Generator().manual_seed(3)) > 0.3
    before, of = model.blocks[0].get_submodule(norm), {layer: mlp_of(model.blocks[layer]) for layer in (0, 1, 2)}
    weight: Any = model.blocks[2].get_submodule(norm).weight
    weight.data.copy_(torch.linspace(-0.6, 2.0, WIDTH))
    gain = weight.detach() + (family == "gemma2")
    functions = {0: lambda x: of[0](before.forward(x)), 1: of[1], 2: lambda x: of[2](x * gain)}
    reads = [hook_name(0, "resid_mid"), hook_name(2, "ln2_normalized")]
    with torch.inference_mode():
        want = logits(model, TOKENS)
        with mlps_replaced(model, functions, where, reads):
            found = logits(model, TOKENS)
        with mlps_replaced(model, functions, where):  # where they read something else, it is another model
            other = logits(model, TOKENS)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(other, want, rtol=1e-2, atol=1e-2)


class Elsewhere(torch.nn.Module):
    """A linear map at some positions, and the module that was there at the others."""

    def __init__(self, before: torch.nn.Module, W_DD: torch.Tensor, where_BL: torch.Tensor) -> None:
        super().__init__()
        self.before, self.W_DD, self.where_BL = before, W_DD, where_BL

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        return torch.where(self.where_BL[..., None], x_BLD @ self.W_DD, self.before(x_BLD))


def test_mlps_that_are_replaced_by_themselves_change_nothing(pair: tuple[LanguageModel, torch.nn.Module]) -> None:
    model, reference = pair
    where = torch.rand(TOKENS.shape, generator=torch.Generator().manual_seed(3)) > 0.3
    functions = {layer: mlp_of(model.blocks[layer]) for layer in (0, 2)}
    with torch.inference_mode(), mlps_replaced(model, functions, where):
        found = logits(model, TOKENS)
    with torch.inference_mode():
        want = reference(TOKENS).logits
        assert torch.equal(logits(model, TOKENS), want)  # nothing is left behind
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_mlps_replaced_by_linear_maps_are_modules_put_in_their_place(
    pair: tuple[LanguageModel, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = pair
    where = torch.rand(TOKENS.shape, generator=torch.Generator().manual_seed(3)) > 0.3
    maps = torch.randn(2, WIDTH, WIDTH, generator=torch.Generator().manual_seed(4)) / WIDTH**0.5
    functions = {layer: lambda x, W=W: x @ W for layer, W in zip((0, 1), maps, strict=True)}
    with torch.inference_mode(), mlps_replaced(model, functions, where):
        found = logits(model, TOKENS)
    for layer, W in zip((0, 1), maps, strict=True):
        block: Any = model.blocks[layer]
        last = "post_feedforward_layernorm" if hasattr(block, "post_feedforward_layernorm") else None
        whole = torch.nn.Sequential(block.mlp, getattr(block, last)) if last else block.mlp
        monkeypatch.setitem(block._modules, "mlp", Elsewhere(whole, W, where))
        if last:
            monkeypatch.setitem(block._modules, last, torch.nn.Identity())
    with torch.inference_mode():
        want = logits(model, TOKENS)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, want.roll(1, 0))


def test_positions_whose_vectors_are_too_long_at_one_hook_are_not_usual(
    pair: tuple[LanguageModel, torch.nn.Module],
) -> None:
    model, _ = pair
    hooks = [hook_name(1, "mlp_in"), hook_name(2, "mlp_out")]
    norms = {hook: value.norm(dim=2) for hook, value in capture(model, TOKENS, hooks).items()}
    longest = {hook: float(norm.flatten().sort().values[-4]) for hook, norm in norms.items()}
    keep = TOKENS % 7 != 0
    want = keep & torch.stack([norm <= longest[hook] for hook, norm in norms.items()]).all(0)
    found = usual_positions(model, TOKENS, keep, longest)
    assert torch.equal(found, want)
    assert found.sum() < keep.sum()
    assert torch.equal(usual_positions(model, TOKENS, keep, {}), keep)


def test_attention_and_mlp_outputs_make_up_the_difference_of_the_stream(
    pair: tuple[LanguageModel, torch.nn.Module],
) -> None:
    model, _ = pair
    kinds = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    got = capture(model, TOKENS, [hook_name(1, kind) for kind in kinds])
    pre, attention, mlp, post = (got[hook_name(1, kind)] for kind in kinds)
    assert torch.allclose(pre + attention + mlp, post, atol=1e-4, rtol=1e-4)


def test_capture_stops_after_the_deepest_hook(pair: tuple[LanguageModel, torch.nn.Module]) -> None:
    model, _ = pair
    ran: list[int] = []
    with edits(model, {hook_name(i, "resid_pre"): lambda value, i=i: ran.append(i) for i in range(LAYERS)})():
        capture(model, TOKENS, [hook_name(0), hook_name(1)])
    assert ran == [0, 1]
    # and leaves nothing behind: a whole pass still runs
    assert spliced_logits(model, TOKENS, hook_name(0), lambda x: x).shape == (3, 20, VOCABULARY)


def test_identity_splice_changes_no_bit_and_zero_splice_does(pair: tuple[LanguageModel, torch.nn.Module]) -> None:
    model, _ = pair
    with torch.inference_mode():
        clean = logits(model, TOKENS)
    assert torch.equal(spliced_logits(model, TOKENS, hook_name(1), lambda x: x.clone()), clean)
    assert not torch.allclose(spliced_logits(model, TOKENS, hook_name(1), torch.zeros_like), clean)
    with torch.inference_mode():
        assert torch.equal(logits(model, TOKENS), clean)


def test_hooks_are_gone_after_an_exception(pair: tuple[LanguageModel, torch.nn.Module]) -> None:
    model, _ = pair

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        spliced_logits(model, TOKENS, hook_name(1), fail)
    spliced_logits(model, TOKENS, hook_name(1), lambda x: x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_resumed_pass_equals_the_whole_spliced_one_to_the_last_bit(
    pair: tuple[LanguageModel, torch.nn.Module], layer: int, kind: HookKind
) -> None:
    model, _ = pair
    hook = hook_name(layer, kind)
    clean = clean_pass(model, TOKENS, hook)
    assert torch.equal(clean.value, capture(model, TOKENS, [hook])[hook])
    if kind == "ln2_normalized":  # there and back through a gain
        torch.testing.assert_close(resumed_states(model, clean, clean.value), clean.states, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(resumed_states(model, clean, clean.value), clean.states)
    noise = torch.randn(clean.value.shape, generator=torch.Generator().manual_seed(2))
    for value in (torch.zeros_like(noise), clean.value + noise):
        states = resumed_states(model, clean, value)
        assert torch.equal(states, spliced_states(model, clean, value))
        assert not torch.allclose(states, clean.states)
        want = spliced_logits(model, TOKENS, hook, lambda x, value=value: value)
        assert torch.equal(head(model, states.flatten(0, 1)).view_as(want), want)
    assert resumes(model, hook)


def test_logits_at_some_positions_are_those_of_all(pair: tuple[LanguageModel, torch.nn.Module]) -> None:
    model, _ = pair
    clean = clean_pass(model, TOKENS, hook_name(0))
    with torch.inference_mode():
        want = logits(model, TOKENS)
    some = head(model, clean.states[:, 3:5].flatten(0, 1))
    torch.testing.assert_close(some, want[:, 3:5].flatten(0, 1), rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        assert torch.equal(logits(model, TOKENS), want)  # and the model is whole again


def test_a_lens_is_refused_where_logits_are_not_of_the_last_layers_stream(checkpoints: dict[str, Path]) -> None:
    model = load_model(str(checkpoints["llama"]), device="cpu", dtype="float32")
    tokens = [0, 5, 6, 7]
    assert logit_lens(model, tokens, 2)["blocks.0.hook_resid_pre"].ids.shape == (5,)
    for position in (4, -5):
        with pytest.raises(ValueError, match=f"position is {position}; the text has tokens 0 to 3"):
            next_tokens(model, tokens, position)
    model.base.register_forward_hook(lambda _, args, output: type(output)(last_hidden_state=output[0] / 2))
    assert len(next_tokens(model, tokens).ids) == 10
    with pytest.raises(ValueError, match="there is no logit lens of model"):
        logit_lens(model, tokens)


def test_a_resumed_pass_runs_no_earlier_block_and_leaves_the_model_whole(
    pair: tuple[LanguageModel, torch.nn.Module],
) -> None:
    model, _ = pair
    clean = clean_pass(model, TOKENS, hook_name(1))
    ran: list[int] = []
    with edits(model, {hook_name(i, "mlp_out"): lambda value, i=i: ran.append(i) for i in range(LAYERS)})():
        resumed_states(model, clean, clean.value)
    assert ran == [2]

    def fail(value: torch.Tensor) -> None:
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"), edits(model, {hook_name(2, "resid_pre"): fail})():
        resumed_states(model, clean, clean.value)
    assert torch.equal(clean_pass(model, TOKENS, hook_name(1)).states, clean.states)


def test_a_block_that_reads_more_than_the_residual_stream_is_noticed(
    pair: tuple[LanguageModel, torch.nn.Module],
) -> None:
    model, _ = pair
    first: list[torch.Tensor] = []
    leak = {
        hook_name(0, "mlp_out"): lambda value: first.append(value),
        hook_name(2, "mlp_out"): lambda value: value + 10 * first.pop() if first else value,
    }
    model.checked.clear()
    with edits(model, leak)():
        assert not resumes(model, hook_name(1))
    model.checked.clear()


def test_facts_of_a_model(checkpoints: dict[str, Path]) -> None:
    model = load_model(str(checkpoints["gpt2"]), device="cpu")
    assert (model.n_layers, model.d_model, model.max_context, model.dtype) == (LAYERS, WIDTH, 64, "float32")
    assert "tokenizer.json" in [file.name for file in model.tokenizer_files]
    assert not [file.name for file in model.tokenizer_files if "model" in file.name]
    assert model.n_vocab == VOCABULARY


def test_a_model_is_where_its_weights_are() -> None:
    """ "cuda" is the weights' "cuda:0", and not equal to it."""
    model = load_model("embedded", device="cpu:0")
    assert model.device == model.module.device


def test_the_best_device_at_hand_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device(None) == "mps"
    assert choose_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="device 'cuda:1' is not at hand; expected mps or cpu"):
        choose_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device(None) == "cuda"
    assert choose_device("cuda:1") == "cuda:1"


def test_the_weights_hash_is_of_the_files_whatever_the_dtype(checkpoints: dict[str, Path]) -> None:
    one = load_model(str(checkpoints["gpt2"]), device="cpu", dtype="float32")
    two = load_model(str(checkpoints["gpt2"]), device="cpu", dtype="bfloat16")
    other = load_model(str(checkpoints["llama"]), device="cpu")
    assert one.weights_hash == two.weights_hash != other.weights_hash


def test_files_that_are_no_weights_leave_the_hash_alone(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = changed(checkpoints, tmp_path / "trained")
    before = load_model(str(path), device="cpu").weights_hash
    for name in ("training_args.bin", "optimizer.bin", "scheduler.bin", "tokenizer.bin"):
        (path / name).write_bytes(b"no weights")
    assert load_model(str(path), device="cpu").weights_hash == before
    write_json(path / "pytorch_model.bin.index.json", {"weight_map": {"w": "part.bin", "v": "absent.bin"}})
    for name in ("pytorch_model-00001-of-00002.bin", "part.bin"):
        (path / name).write_bytes(b"weights")
        now = load_model(str(path), device="cpu").weights_hash
        assert now != before
        before = now


def test_a_store_that_recorded_the_hash_of_before_is_of_its_model(
    checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    """And new weights are still others."""
    path = changed(checkpoints, tmp_path / "trained")
    (path / "training_args.bin").write_bytes(b"no weights")
    store = harvest(config(path, tmp_path / "s", tokens=500, shard_contexts=16), text(corpus))
    assert store is not None
    manifest = read_json(store.folder / MANIFEST)
    former = hash_files([path / "model.safetensors", path / "training_args.bin"])
    assert manifest["identity"]["model"]["weights"] != former
    manifest["identity"]["model"]["weights"] = former
    write_json(store.folder / MANIFEST, manifest)
    grown = extend(store.folder, ExtendConfig(tokens=500, device="cpu"))
    assert grown is not None
    assert grown.manifest["identity"]["model"]["weights"] == former
    assert model_of(grown, "cpu").hash_like("0" * 32) != former
    weights = load_file(path / "model.safetensors")
    save_file({name: value * 1.5 for name, value in weights.items()}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"has weights \w+, store .* was made with {former}"):
        model_of(grown, "cpu")


def test_unknown_models_and_hooks_are_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model './nothing' is not a directory"):
        load_model("./nothing")
    with pytest.raises(ValueError, match="model 'nobody/nothing-here' cannot be loaded"):
        load_model("nobody/nothing-here")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(str(tmp_path))
    shutil.copytree(checkpoints["llama"], tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model '.*cut' cannot be loaded"):
        load_model(str(tmp_path / "cut"))
    model = load_model(str(checkpoints["llama"]), device="cpu")
    with pytest.raises(ValueError, match=r"hook 'blocks.0.hook_q' is not known; expected blocks.LAYER.hook_KIND"):
        check_hook(model, "blocks.0.hook_q")
    with pytest.raises(ValueError, match="hook 'blocks.3.hook_resid_post' is beyond model .*, whose layers are 0 to 2"):
        check_hook(model, hook_name(3))


def test_the_embedded_model_has_a_path() -> None:
    assert Path(model_path("embedded")).name == "model"
    assert model_path("org/name") == "org/name"


# ------------------------------------------------------------------------------------ what a model must be


def changed(checkpoints: dict[str, Path], folder: Path, name: str = "llama") -> Path:
    shutil.copytree(checkpoints[name], folder)
    return folder


def test_a_tokenizer_is_the_one_on_disk(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """WordPiece without BOS opens a text with [CLS], and not with the unknown token."""
    path = changed(checkpoints, tmp_path / "words", "gpt2")
    for file in path.glob("tokenizer*"):
        file.unlink()
    vocabulary = {piece: number for number, piece in enumerate(["[UNK]", "[CLS]", "[SEP]", "the", "cat"])}
    words = Tokenizer(tokenizer_models.WordPiece(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    fast.save_pretrained(path)
    model = load_model(str(path), device="cpu")
    assert model.tokens_of("the cat") == [1, 3, 4]
    assert model.tokenizer.bos_token is None
    assert len(model.tokenizer) == 5


def test_texts_get_bos_once_and_tokens_beyond_the_embedding_are_named(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model = load_model(str(checkpoints["llama"]), device="cpu")
    ids = model.tokens_of("the cat")
    assert ids[0] == 0
    assert model.tokens_of("<|endoftext|>the cat") == ids
    with pytest.raises(ValueError, match="the text is empty"):
        model.tokens_of("")
    with pytest.raises(ValueError, match=r"the text has \d+ tokens; the model takes at most 64"):
        model.tokens_of("the " * 100)
    path = changed(checkpoints, tmp_path / "more")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens([f"<new{number}>" for number in range(VOCABULARY - len(tokenizer) + 1)])
    tokenizer.save_pretrained(path)
    more = load_model(str(path), device="cpu")
    with pytest.raises(
        ValueError, match=r"the text has token 512 \('<new\d+>'\), model .* knows 0 to 511: it was added"
    ):
        more.tokens_of(f"the cat <new{VOCABULARY - 318}>")
    with pytest.raises(ValueError, match="the text has token 512"):
        generate(more, [np.array([0, 512])], [])


def test_a_text_ends_at_every_end_token(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = changed(checkpoints, tmp_path / "ends")
    model = load_model(str(path), device="cpu")
    assert model.end_tokens == {0}
    free = generate(model, "the cat", [], Sampling(max_new_tokens=12, temperature=0.0)).texts[0].tokens
    place = next(place for place in range(1, 12) if free[place] not in free[:place])
    third = int(free[place])
    settings = read_json(path / "generation_config.json") | {"eos_token_id": [0, third]}
    (path / "generation_config.json").write_text(json.dumps(settings))
    ends = load_model(str(path), device="cpu")
    assert ends.end_tokens == {0, third}
    stopped = generate(ends, "the cat", [], Sampling(max_new_tokens=12, temperature=0.0)).texts[0].tokens
    assert stopped.tolist() == free[: place + 1].tolist()


def test_a_damaged_model_is_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = changed(checkpoints, tmp_path / "nan")
    weights = load_file(path / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model '.*nan' gives NaN or infinity on a few plain tokens in float32"):
        load_model(str(path), device="cpu")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 1 of the weights that LlamaForCausalLM has, 'model.layers.1.mlp.down_proj.weight'"
    ):
        load_model(str(path), device="cpu")
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model '.*nan' cannot be loaded: .*model.safetensors") as error:
        load_model(str(path), device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["BertModel", "BertForSequenceClassification"])
def test_an_encoder_without_its_head_is_an_encoder(kind: str, tmp_path: Path) -> None:
    import transformers

    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32
    )
    getattr(transformers, kind)(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"\({kind}\) is no decoder of text from left to right"):
        load_model(str(tmp_path), device="cpu")


def test_a_tokenizer_of_another_model_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = changed(checkpoints, tmp_path / "other")
    for file in EMBEDDED_MODEL_PATH.glob("tokenizer*"):
        shutil.copy(file, path)
    with pytest.raises(
        ValueError, match=r"has 4\d\d\d tokens, its embedding 512 rows: it is the tokenizer of another model"
    ):
        load_model(str(path), device="cpu")


def test_a_model_without_tokenizer_takes_ids_alone(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = changed(checkpoints, tmp_path / "ids")
    for file in path.glob("*token*"):
        file.unlink()
    model = load_model(str(path), device="cpu")
    assert model.tokenizer is None
    with pytest.raises(ValueError, match="the model came without a tokenizer and takes no text"):
        model.tokens_of("the cat")
    made = generate(model, [np.array([3, 4, 5])], [], Sampling(max_new_tokens=3))
    assert len(made.texts[0].tokens) == 3


def test_blocks_that_run_twice_have_no_residual_stream(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LlamaModel.forward

    def twice(self: LlamaModel, *args: object, **kwargs: object) -> object:
        forward(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", twice)
    with pytest.raises(ValueError, match="layer 0 of model .* runs 2 times in a pass, expected once"):
        load_model(str(checkpoints["llama"]), device="cpu")


def test_a_hook_whose_edits_are_ignored_is_refused(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a module returns need not be what is used of it."""
    forward = LlamaMLP.forward

    def deaf(self: torch.nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        hidden = args[0] if args else kwargs["hidden_states"]
        mlp, self.mlp = self.mlp, torch.nn.Identity()
        try:
            real = forward(mlp, hidden)
            mlp(hidden)  # is seen, and not used
            return decoder(self, hidden, *args[1:], **{k: v for k, v in kwargs.items() if k != "hidden_states"}) + real
        finally:
            self.mlp = mlp

    decoder = LlamaDecoderLayer.forward
    monkeypatch.setattr(LlamaDecoderLayer, "forward", deaf)
    model = load_model(str(checkpoints["llama"]), device="cpu")
    check_hook(model, hook_name(1))
    with pytest.raises(ValueError, match=r"an edit at 'blocks.1.hook_mlp_out' of model .* does not reach the logits"):
        check_hook(model, hook_name(1, "mlp_out"))


def test_an_mlp_that_reads_more_than_its_position_has_no_input_to_speak_of(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LlamaMLP.forward
    monkeypatch.setattr(
        LlamaMLP, "forward", lambda self, x: forward(self, x + torch.nn.functional.pad(x, (0, 0, 1, -1)))
    )
    model = load_model(str(checkpoints["llama"]), device="cpu")
    check_hook(model, hook_name(1, "mlp_out"))
    with pytest.raises(
        ValueError, match=r"'blocks.1.hook_mlp_out' of model .* is not a function of 'blocks.1.mlp.hook_in' at each"
    ):
        check_hook(model, hook_name(1, "mlp_in"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_hooks_name_says_layer_and_kind(kind: HookKind) -> None:
    assert parse_hook(hook_name(12, kind)) == (12, kind)


def test_the_input_of_an_mlp_is_behind_the_norm_and_its_gain(pair: tuple[LanguageModel, torch.nn.Module]) -> None:
    """What Hugging Face's own module is called with, to the last bit."""
    model, reference = pair
    modules = [part for name, part in reference.named_modules() if name.endswith("1.mlp")]
    seen: list[torch.Tensor] = []
    handle = modules[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.inference_mode():
        reference(TOKENS)
    handle.remove()
    assert torch.equal(capture(model, TOKENS, [hook_name(1, "mlp_in")])[hook_name(1, "mlp_in")], seen[0])


def into(reference: torch.nn.Module, name: str) -> torch.Tensor:
    """What goes into a module of layer 1."""
    seen: list[torch.Tensor] = []
    module = next(part for path, part in reference.named_modules() if path.endswith(f".1.{name}"))
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.inference_mode():
        reference(TOKENS)
    handle.remove()
    return seen[0]


def test_heads_and_the_stream_between_attention_and_mlp_are_what_modules_are_called_with(
    pair: tuple[LanguageModel, torch.nn.Module],
) -> None:
    model, reference = pair
    z, norm = {
        "gpt2": ("attn.c_proj", "ln_2"), "gpt_neox": ("attention.dense", None),
        "llama": ("self_attn.o_proj", "post_attention_layernorm"), "gemma2": ("self_attn.o_proj", "pre_feedforward_layernorm"),
    }[model.module.config.model_type]  # fmt: skip
    hooks = [hook_name(1, "attn_z"), hook_name(1, "resid_mid"), hook_name(1, "ln2_normalized")]
    got = capture(model, TOKENS, hooks)
    assert torch.equal(got[hooks[0]], into(reference, z))
    if norm is None:
        with pytest.raises(
            ValueError, match=r"'blocks.1.hook_resid_mid' is not in model .*: layer 1 .* beside each other"
        ):
            check_hook(model, hooks[1])
        return
    stream = into(reference, norm)
    assert torch.equal(got[hooks[1]], stream)
    if norm != "ln_2":
        want = stream / (stream.square().mean(2, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(got[hooks[2]], want, rtol=1e-4, atol=1e-4)


def test_a_change_between_attention_and_mlp_is_of_the_stream_and_not_of_what_the_mlp_reads_alone(
    checkpoints: dict[str, Path],
) -> None:
    """Whatever else changes the parts of that stream, before or after it in the order of contexts."""
    model = load_model(str(checkpoints["llama"]), device="cpu", dtype="float32")
    pre, attention, middle, mlp, post = (
        hook_name(1, kind) for kind in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    )  # fmt: skip
    hooks = len(model.base._forward_pre_hooks)
    new = torch.randn(*TOKENS.shape, WIDTH, generator=torch.Generator().manual_seed(5))
    change, parts = {middle: lambda old: new}, {pre: lambda old: old + 1, attention: lambda old: 2 * old}
    for outer, inner in ((change, {}), (change, parts), (parts, change)):
        with edits(model, outer)(), edits(model, inner)():
            got = capture(model, TOKENS, [middle, mlp, post])
            again = capture(model, TOKENS, [middle])
        torch.testing.assert_close(got[middle], new, rtol=1e-5, atol=1e-5)
        assert torch.equal(again[middle], got[middle])
        with torch.inference_mode():
            block: Any = model.blocks[1]
            want = block.mlp(block.post_attention_layernorm(new))
        torch.testing.assert_close(got[mlp], want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got[post], new + want, rtol=1e-4, atol=1e-4)
    assert len(model.base._forward_pre_hooks) == hooks  # nothing is left behind


def test_a_norm_whose_gain_cannot_be_taken_off_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    hook = hook_name(1, "ln2_normalized")
    for name, weight, value, what in (
        ("gpt2", "transformer.h.1.ln_2.bias", 0.5, "its norm adds a bias, which no gain takes off: use mlp_in"),
        (
            "llama",
            "model.layers.1.post_attention_layernorm.weight",
            0.0,
            "the gain of its norm is 0 in 1 of 32 dimensions",
        ),
    ):
        path = changed(checkpoints, tmp_path / name, name)
        weights = load_file(path / "model.safetensors")
        weights[weight][3] = value
        save_file(weights, path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=f"hook '{hook}' of model .*: {what}"):
            check_hook(load_model(str(path), device="cpu"), hook)


def test_heads_wider_than_the_stream_are_harvested_trained_on_evaluated_indexed_and_steered(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, corpus: Path
) -> None:
    settings = FAMILIES["qwen3"].config | {"head_dim": 12}
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **settings)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    z, middle = hook_name(1, "attn_z"), hook_name(1, "resid_mid")
    store = harvest(
        config(tmp_path / "model", tmp_path / "store", layers=(1,), kinds=("attn_z", "resid_mid"), tokens=2_000),
        text(corpus),
    )
    assert store
    assert (store.d_in(z), store.d_in(middle)) == (48, WIDTH)
    run = tmp_path / "run"
    folders = train(
        TrainConfig(
            store=store.folder, hook=(z, middle), out=run, k=(4,), d_sae=(64,), tokens=6_000, batch=256, device="cpu"
        )
    )
    assert folders
    evaluate(EvalConfig(run=run, tokens=400, dead_rows=500, resamples=10, device="cpu"))
    for folder in folders:
        metrics = read_json(folder / "evaluation.json")["metrics"]
        assert np.isfinite([metrics["fvu"], metrics["delta_ce"]]).all()
        index = build_index(IndexConfig(sae=folder, tokens=1_000, sample=300, device="cpu"))
        assert index
        bench = open_bench(folder, device="cpu")
        assert bench.index
        # What is written before attention's last map is no direction of the stream.
        assert (bench.index.top_logits is None) == (bench.index.ends.reads == (z,))
        arms = arms_of([bench.intervention(0, "2n")])
        made = generate(bench.model, "the cat", arms, Sampling(max_new_tokens=3, n_samples=1))
        assert any(one.kl.max() > 0 for one in made.of("steered"))


@pytest.mark.parametrize(
    ("family", "name", "attention", "mlp", "read", "post", "z", "norm"),
    [
        ("gpt2", "GPT2LMHeadModel", "attn", "mlp", "mlp", "mlp.c_proj", "attn.c_proj", "ln_2"),
        ("falcon", "FalconForCausalLM", "self_attention", "mlp", "mlp", "mlp.dense_4h_to_h", "self_attention.dense", None),
        ("opt", "OPTForCausalLM", "self_attn", "fc2", "fc1", "fc2", "self_attn.out_proj", "final_layer_norm"),  # no module of its own for the MLP: its first and last layer
        ("bloom", "BloomForCausalLM", "self_attention.dense", "mlp.dense_4h_to_h", "mlp", "mlp.dense_4h_to_h", "self_attention.dense", "post_attention_layernorm"),  # adds the stream itself
        ("olmo2", "Olmo2ForCausalLM", "post_attention_layernorm", "post_feedforward_layernorm", "mlp", "mlp.down_proj", "self_attn.o_proj", None),  # norms behind both
        ("granitemoe", "GraniteMoeForCausalLM", "self_attn", "block_sparse_moe", "block_sparse_moe", None, "self_attn.o_proj", "post_attention_layernorm"),  # scaled on their way: no aliases
    ],
)  # fmt: skip
def test_transformer_lens_says_where_a_family_writes(
    family: str, name: str, attention: str, mlp: str, read: str, post: str | None, z: str, norm: str | None
) -> None:
    """What fails here with another version of TransformerLens is what `models/places.py` takes of its internals."""
    config = AutoConfig.for_model(family, **FAMILIES[family].config)
    assert transformer_lens_paths(config, name, family) == {
        "attn_out": attention, "mlp_out": mlp, "mlp_in": read, "attn_z": z, **({"ln2_normalized": norm} if norm else {}), **({"mlp_post": post} if post else {}),
    }  # fmt: skip


def test_what_is_gone_from_transformer_lens_is_no_unknown_family(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory

    config = AutoConfig.for_model("gpt2", **FAMILIES["gpt2"].config)
    assert transformer_lens_paths(config, "NobodysLMHeadModel", "nobody's") == {}
    monkeypatch.delattr(ArchitectureAdapterFactory, "select_architecture_adapter")
    with pytest.raises(AttributeError, match="select_architecture_adapter"):
        transformer_lens_paths(config, "GPT2LMHeadModel", "gpt2")
    monkeypatch.undo()
    builder = "transformer_lens.model_bridge.sources._bridge_builder.build_bridge_config_from_hf"
    monkeypatch.setattr(builder, lambda config, *, family: None)  # as a later version might have it
    with pytest.raises(TypeError, match="too many positional arguments"):
        transformer_lens_paths(config, "GPT2LMHeadModel", "gpt2")
