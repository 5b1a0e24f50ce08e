import dataclasses
import json
import random
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
from conftest import CONTEXT, HOOK, WIDTH, sentences
from safetensors.torch import load_file, save_file
from test_store import make, random_rows
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from saebench.files import read_json, write_json
from saebench.harvest import HarvestConfig, deal, harvest, settings
from saebench.harvest.settings import bytes_per_row, settled
from saebench.models import hook_name, load_model
from saebench.store import Store, open_store
from saebench.store.manifest import read_manifest
from saebench.store.norms import describe
from saebench.store.source import model_of
from saebench.text import SPLITS, Context, Document, Encoder, TextConfig, open_documents, pack, split_of


def config(model: Path, out: Path, **options: object) -> HarvestConfig:
    small = {
        "layers": (0, 1),
        "tokens": 12_000,
        "context": CONTEXT,
        "batch": 8,
        "shard_contexts": 64,
        "dtype": "float32",
    }
    return HarvestConfig(model=str(model), out=out, **{**small, **options})  # type: ignore[arg-type]


def text(corpus: Path, **options: object) -> TextConfig:
    return TextConfig(dataset=str(corpus), **{"validation_fraction": 0.2, **options})  # type: ignore[arg-type]


def arguments(model: Path, corpus: Path, out: Path) -> list[str]:
    return [
        "harvest", "--model", str(model), "--dataset", str(corpus), "--validation-fraction", "0.2", "--layers", "0,1",
        "--tokens", "12000", "--context", str(CONTEXT), "--batch", "8", "--shard-contexts", "64", "--dtype", "float32",
        "--device", "cpu", "--out", str(out),
    ]  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store by its path, but for the lock."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ------------------------------------------------------------------------------------ what is stored


def test_rows_are_the_models_hidden_states_of_the_packed_text(
    store: Store, checkpoints: dict[str, Path], corpus: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    reference = AutoModelForCausalLM.from_pretrained(checkpoints["llama"], dtype=torch.float32).eval()
    for shard in store.shards[:3]:
        tokens = torch.tensor(shard.column("tokens").reshape(-1, CONTEXT)).long()
        with torch.no_grad():
            states = reference(tokens, output_hidden_states=True).hidden_states
        for layer in (0, 1):
            rows = shard.rows(f"blocks.{layer}.hook_resid_post").view(-1, CONTEXT, WIDTH)
            assert torch.allclose(rows, states[layer + 1], atol=1e-4, rtol=1e-4)
    names = store.document_names()
    first = store.of_split("train")[0]
    doc = int(first.column("doc_id")[0])
    ids = first.column("tokens")[(first.column("doc_id") == doc) & first.column("keep")]
    assert (corpus / names[doc]).read_text().startswith(tokenizer.decode(ids.tolist()))


def test_splits_follow_the_documents_and_provenance_is_kept(store: Store, corpus: Path) -> None:
    names = store.document_names()
    for shard in store.shards:
        texts = {(corpus / names[int(i)]).read_text() for i in shard.column("doc_id")}
        assert {split_of(text, 0.2) for text in texts} == {shard.split}
        assert np.array_equal(shard.column("position"), np.tile(np.arange(CONTEXT), shard.n_rows // CONTEXT))
        assert np.array_equal(shard.column("keep"), shard.column("tokens") != 0)
    assert store.rows("train") == 12_000
    assert 0 < store.rows("validation") < 12_000
    assert not store.manifest["exhausted"]


def test_held_out_rows_stop_at_their_limit(checkpoints: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    store = harvest(config(checkpoints["gpt2"], tmp_path / "s", validation_tokens=320), text(corpus))
    assert store is not None
    assert (store.rows("train"), store.rows("validation")) == (12_000, 320)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_random_weights_are_those_of_a_new_model_of_the_same_shape(
    family: str, checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    told = config(checkpoints[family], tmp_path / "s", tokens=640, validation_tokens=64, random_weights=3)
    store = harvest(told, text(corpus))
    assert store is not None
    drawn = AutoModelForCausalLM.from_pretrained(tmp_path / "s-model", dtype=torch.float32).eval()
    trained = AutoModelForCausalLM.from_pretrained(checkpoints[family], dtype=torch.float32)
    torch.manual_seed(3)
    again = type(trained)(trained.config)
    assert {name: value.shape for name, value in drawn.state_dict().items()} == {
        name: value.shape for name, value in trained.state_dict().items()
    }
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in drawn.state_dict().items())
    shard = store.of_split("train")[0]
    tokens = torch.tensor(shard.column("tokens").reshape(-1, CONTEXT)).long()
    with torch.no_grad():
        states = drawn(tokens, output_hidden_states=True).hidden_states
    assert torch.allclose(
        shard.rows("blocks.0.hook_resid_post").view(-1, CONTEXT, WIDTH), states[1], atol=1e-4, rtol=1e-4
    )
    assert model_of(store).weights_hash == store.manifest["identity"]["model"]["weights"]  # what evaluates it finds it
    assert harvest(told, text(corpus)) is not None  # finished, and the same model
    with pytest.raises(
        ValueError, match=r"s-model holds .*'seed': 3.*; expected .*'seed': 4.*: choose another --out, or delete it"
    ):
        harvest(dataclasses.replace(told, random_weights=4), text(corpus))


def test_text_that_ends_early_is_said_and_kept_whole(
    checkpoints: dict[str, Path],
    corpus: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    store = harvest(config(checkpoints["gpt2"], tmp_path / "s", tokens=10**6, layers=(0,)), text(corpus))
    assert store is not None
    assert store.manifest["exhausted"]
    assert f"the data set ended after {store.rows('train'):,} training tokens of the 1,000,000 asked for" in caplog.text
    kept = sum(store.rows(split, kept=True) for split in SPLITS)
    documents = [d.text or "" for d in open_documents(text(corpus))]
    assert kept == sum(map(len, tokenizer(documents)["input_ids"]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_dtypes_round_the_same_vectors(
    dtype: str, store: Store, checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    narrow = harvest(config(checkpoints["llama"], tmp_path / "s", dtype=dtype), text(corpus))
    assert narrow is not None
    want = store.shards[0].rows(HOOK).to(getattr(torch, dtype))
    assert torch.equal(narrow.shards[0].rows(HOOK), want)


def test_what_mlps_read_and_write_is_kept_side_by_side(
    checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    told = config(checkpoints["gemma2"], tmp_path / "s", kinds=("mlp",), tokens=2_000)
    store = harvest(told, text(corpus))
    assert store is not None
    assert store.hooks == [f"blocks.{i}.{name}" for i in (0, 1) for name in ("hook_mlp_out", "mlp.hook_in")]
    model = load_model(str(checkpoints["gemma2"]), device="cpu", dtype="float32")
    block: Any = model.blocks[1]
    for shard in store.shards:
        read, written = shard.rows("blocks.1.mlp.hook_in"), shard.rows("blocks.1.hook_mlp_out")
        with torch.inference_mode():
            found = block.post_feedforward_layernorm(block.mlp(read))
        torch.testing.assert_close(found, written, rtol=1e-4, atol=1e-4)
    for hook in store.hooks:
        rows = torch.cat(list(store.usual_rows(hook, "train")))
        assert store.statistics(hook)["mean"] == pytest.approx(rows.double().mean(0).tolist(), abs=1e-6)
    assert f"  blocks.1.mlp.hook_in  d_in {WIDTH}, median norm" in describe(store)
    one_by_one = config(checkpoints["gemma2"], tmp_path / "s", kinds=("mlp_in", "mlp_out"), tokens=2_000)
    assert harvest(one_by_one, text(corpus)) is not None  # the same store, complete already
    with pytest.raises(ValueError, match=r"with kinds \('mlp', 'mlp_out'\) name a hook twice"):
        config(checkpoints["gemma2"], tmp_path / "s", kinds=("mlp", "mlp_out"))


@pytest.mark.parametrize(
    ("family", "norm"), [("llama", "post_attention_layernorm"), ("gemma2", "pre_feedforward_layernorm")]
)
def test_what_is_normalised_before_the_gain_is_kept(
    family: str, norm: str, checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    """x ÷ √(mean x² + ε), which times the norm's own gain is what the MLP reads; Gemma's is 1 and its weight."""
    path = tmp_path / "model"
    shutil.copytree(checkpoints[family], path)
    weights = load_file(path / "model.safetensors")
    name = f"model.layers.1.{norm}.weight"
    weights[name] = torch.linspace(-0.5, 2.0, WIDTH) + 0.01
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    kinds = ("resid_mid", "ln2_normalized", "mlp_in")
    store = harvest(config(path, tmp_path / "s", layers=(1,), kinds=kinds, tokens=2_000), text(corpus))
    assert store is not None
    model = load_model(str(path), device="cpu", dtype="float32")
    module: Any = model.blocks[1].get_submodule(norm)
    gain = weights[name] + (family == "gemma2")
    for shard in store.shards:
        stream, normalized, read = (shard.rows(hook_name(1, kind)) for kind in kinds)
        want = stream / (stream.square().mean(1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(normalized, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(normalized * gain, read, rtol=1e-4, atol=1e-5)
        with torch.inference_mode():
            torch.testing.assert_close(module(stream), read, rtol=1e-4, atol=1e-5)


def test_a_hook_that_a_store_lacks_is_named_with_its_harvest(store: Store) -> None:
    made = store.manifest["identity"]
    expected = (
        f"hook 'blocks.2.mlp.hook_in' is not in {store.folder}; it has blocks.0.hook_resid_post, blocks.1.hook_resid_post. "
        f"A store that has both: `saebench harvest --model {made['model']['id']} --dataset {made['text']['dataset']} "
        f"--layers 0,1,2 --kinds resid_post,mlp --tokens 12000 --context {CONTEXT} --out ANOTHER`"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        store.d_in("blocks.2.mlp.hook_in")


# ------------------------------------------------------------------------- interruption and resuming


@pytest.fixture(scope="module")
def whole(checkpoints: dict[str, Path], corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The contents of a store harvested by the command line without interruption."""
    out = tmp_path_factory.mktemp("whole") / "s"
    status, stderr = processes.run(*arguments(checkpoints["llama"], corpus, out))
    assert status == 0, stderr
    return contents(out)


@pytest.mark.parametrize("seed", range(3))
def test_killed_and_resumed_equals_uninterrupted(
    seed: int, whole: dict[str, bytes], checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s"
    shards = random.Random(seed).randrange(1, 13)
    child = processes.start(*arguments(checkpoints["llama"], corpus, out), slow=0.002)
    processes.signal_when(child, lambda: len(list(out.glob("shard-*.h5"))) >= shards, signal.SIGKILL)
    assert not read_json(out / "manifest.json")["complete"]
    status, stderr = processes.run(*arguments(checkpoints["llama"], corpus, out))
    assert status == 0, stderr
    assert contents(out) == whole


def test_ctrl_c_ends_after_the_shard_and_the_same_command_continues(
    whole: dict[str, bytes], checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s"
    child = processes.start(*arguments(checkpoints["llama"], corpus, out), slow=0.05)
    status, stderr = processes.signal_when(child, lambda: (out / "shard-00001.h5").exists(), signal.SIGINT)
    assert status == 130
    assert "stopping as soon as the work so far is safe" in stderr
    assert "the same command continues" in stderr
    assert not list(out.glob(".*.tmp"))
    n = len(read_manifest(out)["shards"])
    assert n == len(list(out.glob("shard-*.h5"))) >= 2
    with pytest.raises(ValueError, match=f"is unfinished \\({n} shards so far\\)"):
        open_store(out)
    status, stderr = processes.run(*arguments(checkpoints["llama"], corpus, out))
    assert status == 0, stderr
    assert contents(out) == whole


def test_a_full_disk_loses_nothing_that_was_whole(
    whole: dict[str, bytes], checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    """Some shards are written; then RLIMIT_FSIZE stands for a disk that has no room for the next."""
    out = tmp_path / "s"
    child = processes.start(*arguments(checkpoints["llama"], corpus, out), slow=0.05)
    processes.signal_when(child, lambda: (out / "shard-00001.h5").exists(), signal.SIGINT)
    before = {name: data for name, data in contents(out).items() if name.endswith(".h5")}
    limit = len(whole["shard-00000.h5"]) - 1000
    status, stderr = processes.run(*arguments(checkpoints["llama"], corpus, out), file_limit=limit)
    assert status == 2
    assert f"shard-{len(before):05d}.h5 failed" in stderr
    assert f"The {len(before)} whole shards before it are safe; free some space and run the same command" in stderr
    assert "Traceback" not in stderr
    assert {name: data for name, data in contents(out).items() if name.endswith(".h5")} == before
    assert not list(out.glob(".*.tmp"))
    status, _ = processes.run(*arguments(checkpoints["llama"], corpus, out))
    assert status == 0
    assert contents(out) == whole


def test_a_finished_store_is_reused(
    store: Store, checkpoints: dict[str, Path], corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    shutil.copytree(store.folder, tmp_path / "s")
    before = contents(tmp_path / "s")
    again = harvest(config(checkpoints["llama"], tmp_path / "s"), text(corpus))
    assert again is not None
    assert "is complete already" in caplog.text
    assert contents(tmp_path / "s") == before


def test_vectors_are_kept_as_the_model_gives_them(checkpoints: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    """bfloat16 goes on where float16 ends, at 65,504."""
    small = {"layers": (0,), "tokens": 1_000, "dtype": None}
    whole = harvest(config(checkpoints["llama"], tmp_path / "whole", **small), text(corpus))
    half = harvest(config(checkpoints["llama"], tmp_path / "half", **small, model_dtype="bfloat16"), text(corpus))
    assert whole
    assert half
    assert (whole.manifest["dtype"], half.manifest["dtype"]) == ("float16", "bfloat16")
    assert half.manifest["identity"]["dtype"] == "bfloat16"
    # A store of before goes on as it was begun.
    begun = config(checkpoints["llama"], tmp_path / "begun", **small | {"dtype": "float16"}, model_dtype="bfloat16")
    assert harvest(begun, text(corpus))
    assert harvest(dataclasses.replace(begun, dtype=None), text(corpus))


def test_a_store_that_says_nothing_of_splits_and_encodings_goes_on_as_it_was_made(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """As the first stores do: documents held out by name, every file read as UTF-8 whatever it is."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(30):
        (corpus / f"{number}.txt").write_bytes(b"caf\xe9\r\n" + sentences(number, 200).encode())
    first = text(corpus, split_by="name", errors="replace")
    small = {"layers": (0,), "tokens": 2_000}
    whole = harvest(config(checkpoints["llama"], tmp_path / "whole", **small), first)
    assert whole
    identity = whole.manifest["identity"]["text"]
    assert not {"split_by", "errors"} & set(identity)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    manifest = read_json(tmp_path / "cut" / "manifest.json")
    last = manifest["shards"].pop()["file"]
    manifest |= {"complete": False}
    write_json(tmp_path / "cut" / "manifest.json", manifest)
    (tmp_path / "cut" / last).unlink()
    assert harvest(config(checkpoints["llama"], tmp_path / "cut", **small), text(corpus))
    assert contents(tmp_path / "cut")[last] == contents(tmp_path / "whole")[last]
    with pytest.raises(ValueError, match="split_by: None -> 'content'"):
        harvest(
            config(checkpoints["llama"], tmp_path / "whole", **small),
            text(corpus, split_by="content", errors="replace"),
        )
    with pytest.raises(ValueError, match=r"'.*.txt' is not text in utf-8"):
        harvest(config(checkpoints["llama"], tmp_path / "new", **small), text(corpus))


def test_a_full_disk_before_the_first_shard_is_one_line(
    checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    status, stderr = processes.run(*arguments(checkpoints["llama"], corpus, tmp_path / "s"), file_limit=1000)
    assert status == 2
    assert "saebench: error: " in stderr
    assert "Traceback" not in stderr


def test_a_first_mistake_does_not_bind_the_folder(checkpoints: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": sentences(i, 60)}) + "\n" for i in range(40)))
    options = config(checkpoints["llama"], tmp_path / "s", tokens=500)
    with pytest.raises(ValueError, match="column 'content'"):
        harvest(options, text(rows, column="content"))
    assert harvest(options, text(rows)) is not None


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_resuming_names_a_shard_that_is_no_longer_whole(
    damage: str, store: Store, checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    shutil.copytree(store.folder, tmp_path / "s")
    manifest = read_json(tmp_path / "s" / "manifest.json")
    manifest |= {"complete": False, "shards": manifest["shards"][:4]}
    (tmp_path / "s" / "manifest.json").write_text(json.dumps(manifest))
    path = tmp_path / "s" / "shard-00002.h5"
    path.write_bytes(path.read_bytes()[:-1])
    if damage == "missing":
        path.unlink()
    with pytest.raises(ValueError, match=r"shard-00002.h5 (is missing; restore|has \d+ bytes, the manifest says)"):
        harvest(config(checkpoints["llama"], tmp_path / "s"), text(corpus))


def test_contexts_in_a_pass_and_in_a_shard_are_bounded_in_bytes(
    checkpoints: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a store was begun with holds; what is given is obeyed."""
    model = load_model(str(checkpoints["llama"]), dtype="float32")
    usual = config(checkpoints["llama"], tmp_path / "s", tokens=400, batch=None, shard_contexts=None)
    assert (settled(usual, model).per_pass, settled(usual, model).per_shard) == (32, 256)
    wide = bytes_per_row([4096] * 100, "float16") * 256  # 100 layers of Llama 3.1 8B
    assert {name: bound // wide for name, (_, bound) in settings._BOUNDS.items()} == {"batch": 1, "shard_contexts": 5}
    context = CONTEXT * (2 * WIDTH * 4 + 4 + 4 + 4 + 1)
    monkeypatch.setattr(
        settings, "_BOUNDS", {"batch": (32, 6 * context - 1), "shard_contexts": (256, 13 * context - 1)}
    )
    made = harvest(usual, text(corpus))
    assert made is not None
    assert {name: made.manifest["identity"][name] for name in ("batch", "shard_contexts")} == {
        "batch": 5,
        "shard_contexts": 12,
    }
    assert max(shard.n_rows for shard in made.shards) == 12 * CONTEXT
    given = dataclasses.replace(usual, batch=8, out=tmp_path / "t")
    assert (settled(given, model).per_pass, settled(given, model).per_shard) == (8, 12)
    monkeypatch.undo()
    assert harvest(usual, text(corpus)) is not None
    with pytest.raises(ValueError, match="made with other settings: shard_contexts: 12 -> 13"):
        harvest(dataclasses.replace(usual, shard_contexts=13), text(corpus))


def test_other_settings_are_refused_with_the_values(
    store: Store, checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    shutil.copytree(store.folder, tmp_path / "s")
    with pytest.raises(
        ValueError, match=r"made with other settings: layers: \[0, 1\] -> \[1\]; tokens: 12000 -> 16000\. Use the same"
    ):
        harvest(config(checkpoints["llama"], tmp_path / "s", tokens=16_000, layers=(1,)), text(corpus))
    with pytest.raises(ValueError, match=r"model\.weights: '\w+' -> '\w+'"):
        harvest(config(checkpoints["gpt2"], tmp_path / "s"), text(corpus))


def test_a_changed_corpus_is_refused(store: Store, checkpoints: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(store.folder, tmp_path / "s")
    shutil.copytree(corpus, tmp_path / "corpus")
    (tmp_path / "corpus" / "00.txt").write_text("something else")
    with pytest.raises(ValueError, match=r"text\.fingerprint: '\w+' -> '\w+'"):
        harvest(config(checkpoints["llama"], tmp_path / "s"), text(tmp_path / "corpus"))


# --------------------------------------------------------------------------------------- bad input


def test_token_ids_of_another_vocabulary_are_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    ids = [[0, 1, 700 if row == 30 else 2, *range(3, CONTEXT)] for row in range(40)]
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    with pytest.raises(ValueError, match=r"document train/30 has token 700, model .* knows 0 to 511: .* another model"):
        harvest(config(checkpoints["llama"], tmp_path / "s"), text(tmp_path / "ids.jsonl"))


def test_a_tokenizer_that_cannot_open_a_context_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints["llama"], tmp_path / "bare")
    told = read_json(tmp_path / "bare" / "tokenizer_config.json")
    for name in ("bos_token", "eos_token", "pad_token"):
        del told[name]
    (tmp_path / "bare" / "tokenizer_config.json").write_text(json.dumps(told))
    tokens = read_json(tmp_path / "bare" / "tokenizer.json")
    tokens["added_tokens"] = []
    vocabulary = tokens["model"]["vocab"]
    vocabulary["<|other|>"] = vocabulary.pop("<|endoftext|>")
    vocabulary |= {f"<{i}>": i for i in range(len(vocabulary), 512)}  # as many tokens as embeddings
    (tmp_path / "bare" / "tokenizer.json").write_text(json.dumps(tokens))
    (tmp_path / "a.txt").write_text("a cat")
    with pytest.raises(ValueError, match=r"has neither a BOS nor an EOS token"):
        harvest(config(tmp_path / "bare", tmp_path / "s"), text(tmp_path / "a.txt"))
    (tmp_path / "bare" / "tokenizer_config.json").write_text(json.dumps(told | {"bos_token": "<new>"}))
    token = {"id": 512, "content": "<new>", "special": True}
    tokens["added_tokens"] = [token | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)]
    (tmp_path / "bare" / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(ValueError, match=r"opens contexts with token 512, beyond the model's 512 embeddings"):
        harvest(config(tmp_path / "bare", tmp_path / "s"), text(tmp_path / "a.txt"))


def test_layers_beyond_the_model_and_contexts_too_long_are_named(
    checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="hook 'blocks.5.hook_resid_post' is beyond model"):
        harvest(config(checkpoints["llama"], tmp_path / "s", layers=(0, 5)), text(corpus))
    with pytest.raises(ValueError, match="context is 128, model .* takes at most 64 tokens"):
        harvest(config(checkpoints["llama"], tmp_path / "s", context=128), text(corpus))
    assert not (tmp_path / "s" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ()}, "layers is .*; expected at least one layer"),
        ({"layers": (1, 1)}, "name a hook twice"),
        ({"layers": (-1,)}, "layers is .*; expected at least one layer"),
        ({"tokens": 0}, "tokens is 0; expected at least 1"),
        ({"context": 1}, "context is 1; expected at least 2: BOS and a token"),
    ],
)
def test_impossible_settings_are_named(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, tmp_path, **options)


def test_text_without_documents_in_a_split_is_too_small(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for name, content in (("empty", ""), ("one", sentences(0, 50))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(content)
        with pytest.raises(
            ValueError, match="is too small: it ended before a document fell into the (train|validation) split"
        ):
            harvest(config(checkpoints["llama"], tmp_path / f"store-{name}"), text(tmp_path / name))


def test_a_disk_too_small_is_found_before_the_first_forward(
    checkpoints: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr("saebench.harvest.run.capturer", lambda *args: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=r"needs about 4,035\.0 MB for 15,000,000 rows and the disk has 1\.0 MB free"):
        harvest(
            config(checkpoints["llama"], tmp_path / "s", tokens=12 * 10**6, validation_tokens=3 * 10**6), text(corpus)
        )


# ----------------------------------------------------------------------------------------- dealing


def test_dealing_resumes_exactly_at_every_shard() -> None:
    """Also where the training split is full while held-out contexts still wait for their shard."""
    encoder = Encoder(lambda texts: [[1] * len(t) for t in texts], 0, frozenset({0}))
    documents = [Document(i, str(i), str(i), "x" * (3 + 5 * i % 17)) for i in range(60)]
    for limit in (1, 9, 25, 1000):
        limits = {"train": limit, "validation": 7}

        def contexts(cursors: dict[str, tuple[int, int]] | None = None) -> object:
            first = min(n for n, _ in cursors.values()) if cursors else 0
            return pack(iter(documents[first:]), encoder, 5, 0.3, cursors)  # type: ignore[arg-type]

        whole = list(deal(contexts(), 4, limits, dict.fromkeys(SPLITS, 0), (0, 0)))  # type: ignore[arg-type]
        for cut in range(len(whole) + 1):
            cursors = dict.fromkeys(SPLITS, (0, 0))
            done = dict.fromkeys(SPLITS, 0)
            for plan in whole[:cut]:
                cursors[plan.split] = plan.cursor
                done[plan.split] += len(plan.contexts)
            rest = list(deal(contexts(cursors), 4, limits, done, cursors["train"]))  # type: ignore[arg-type]
            assert [described(plan.split, plan.contexts) for plan in rest] == [
                described(plan.split, plan.contexts) for plan in whole[cut:]
            ]


def described(split: str, contexts: list[Context]) -> tuple[str, list[list[int]], list[tuple[int, int]]]:
    return split, [c.doc_id.tolist() for c in contexts], [c.cursor for c in contexts]


def test_a_store_of_vectors_of_ones_own_is_not_harvested_into(tmp_path: Path) -> None:
    made = make(tmp_path / "s", [("train", random_rows(64), np.ones(64, dtype=bool))])
    before = {path.name: path.read_bytes() for path in made.folder.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match="holds a store of vectors that no harvest made: choose another --out"):
        harvest(HarvestConfig(layers=(1,), out=made.folder), TextConfig())
    assert {
        path.name: path.read_bytes() for path in made.folder.iterdir() if path.is_file() and path.name in before
    } == before
