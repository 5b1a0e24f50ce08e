"""Small real things: a tokenizer, checkpoints of four shapes, text on disk, a harvested store."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["LOKY_MAX_CPU_COUNT"] = "1"  # probes without processes of their own, but where those are what is tried
os.environ["OMP_NUM_THREADS"] = "1"  # also of servers and jobs: to models this small a second thread is a burden

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # asked for when transformers imports triton

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from saebench.harvest import HarvestConfig, harvest
from saebench.sae import SAE, GatedSAE, JumpReLUSAE, initialise, new_sae
from saebench.store import Store
from saebench.text import TextConfig
from saebench.train.recipes import RECIPES

VOCABULARY, LAYERS, WIDTH, CONTEXT = 512, 3, 32, 16
LATENTS = 48  # of `an_sae`
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
WIDE = {**COMMON, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 64}
SHAPES = {
    "gpt2": GPT2Config(**COMMON, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=64),
    "neox": GPTNeoXConfig(**WIDE, max_position_embeddings=64),
    "llama": LlamaConfig(**WIDE, max_position_embeddings=64, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**WIDE, max_position_embeddings=64, num_key_value_heads=2, head_dim=8, sliding_window=8),
}


def sentences(seed: int, n: int) -> str:
    """Text with structure that a corpus and a tokenizer can be made of."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = "the a red blue cat dog house runs sees under over and then return def import value None"
    words = vocabulary.split()
    picks = torch.randint(len(words), (n,), generator=generator).tolist()
    return " ".join(words[pick] for pick in picks) + ".\n"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([sentences(seed, 200) for seed in range(20)], trainer)
    eot = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=eot, eos_token=eot, pad_token=eot)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """A `save_pretrained` directory for each of four model shapes."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, config in SHAPES.items():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3.0)  # far enough from zero that layers matter
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in SHAPES}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text files."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(64):
        (folder / f"{number:02d}.txt").write_text(sentences(number, 30 + 7 * number))
    return folder


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path], corpus: Path) -> Store:
    """Two layers of the Llama-shaped model over the corpus."""
    config = HarvestConfig(
        model=str(checkpoints["llama"]), layers=(0, 1), tokens=12_000, context=CONTEXT, batch=8, shard_contexts=64,
        dtype="float32", out=tmp_path_factory.mktemp("store"),
    )  # fmt: skip
    made = harvest(config, TextConfig(dataset=str(corpus), validation_fraction=0.2))
    assert made is not None
    return made


HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> Path:
    """A run that the app can show."""
    from workbench import make_run

    return make_run(tmp_path_factory.mktemp("workbench"), checkpoints["llama"])


@torch.no_grad()
def an_sae(architecture: str, store: Store, seed: int = 0) -> SAE:
    """An SAE whose latents fire on 1% to 20% of the store's rows, but for the last, which is dead."""
    sae = new_sae(architecture, WIDTH, LATENTS, k=6)
    initialise(
        sae,
        torch.tensor(store.statistics(HOOK)["mean"]),
        torch.Generator().manual_seed(seed),
        RECIPES[architecture].gains,
    )
    projections = sae.project(store.of_split("train")[0].rows(HOOK))
    shares = torch.linspace(0.01, 0.2, LATENTS)
    bias = -torch.stack([column.quantile(1 - share) for column, share in zip(projections.T, shares, strict=True)])
    bias[-1] = -1e6
    if isinstance(sae, GatedSAE):
        sae.b_gate.copy_(bias)
        sae.b_mag.copy_(bias + 0.1)
    else:
        sae.b_enc.copy_(bias)
    if isinstance(sae, JumpReLUSAE):
        sae.threshold.fill_(0.05)
    return sae
