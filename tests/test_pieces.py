"""One way from ids to text, for every kind of vocabulary."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from saebench.pieces import TokenBytes

TEXT = "the cat sat, café naïve 漢字 \U0001f600 end"
CORPUS = ["the cat sat on the mat, the end", "café naïve résumé", "a b c d"]


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return made


def sentencepiece() -> Tokenizer:
    """As in Llama 2: words begin with U+2581, and what is in no piece is bytes."""
    pieces = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *"thecatsondm,",
        "\u2581the",
        "\u2581cat",
        "th",
        "he",
    ]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    made = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


def wordpiece() -> Tokenizer:
    vocabulary = {
        piece: number for number, piece in enumerate(["[UNK]", "[CLS]", "the", "cat", "sat", "##s", "sa", "##t", ","])
    }
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return made


def words_marked_at_their_end() -> Tokenizer:
    """As in GPT (2018)."""
    pieces = ["<unk>", "the</w>", "c", "a", "t</w>", "s</w>"]
    made = Tokenizer(
        models.BPE(
            {piece: number for number, piece in enumerate(pieces)}, [], unk_token="<unk>", end_of_word_suffix="</w>"
        )
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def wrapped(made: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", [byte_level, sentencepiece])
def test_pieces_joined_are_the_text(kind: object) -> None:
    tokenizer = wrapped(kind())  # type: ignore[operator]
    pieces, ids = TokenBytes(tokenizer), ids_of(tokenizer, TEXT)
    assert b"".join(pieces[token] for token in ids).decode() == TEXT
    assert pieces.text(ids) == TEXT
    assert pieces.text(ids[3:4] + ids[:3]).startswith(pieces[ids[3]].decode("utf-8", "backslashreplace"))


def test_words_keep_their_spaces() -> None:
    tokenizer = wrapped(wordpiece())
    assert TokenBytes(tokenizer).text(ids_of(tokenizer, "the cats sat")) == " the cats sat"
    marked = wrapped(words_marked_at_their_end())
    assert [TokenBytes(marked)[token] for token in range(1, 6)] == [b"the ", b"c", b"a", b"t ", b"s "]


@pytest.mark.parametrize("kind", [byte_level, sentencepiece, wordpiece])
def test_added_tokens_are_the_text_that_they_say(kind: object) -> None:
    """And not what their letters would stand for in byte-level code: õ is a byte there."""
    made: Tokenizer = kind()  # type: ignore[operator]
    made.add_tokens(["õ", "café", "Ġx"])
    made.add_special_tokens(["<|ende\u2581|>"])
    tokenizer = wrapped(made)
    pieces = TokenBytes(tokenizer)
    for text in ("õ", "café", "Ġx", "<|ende\u2581|>"):
        (token,) = ids_of(tokenizer, text)
        assert pieces[token].decode() == text


def test_runs_of_spaces_among_added_tokens_are_spaces() -> None:
    """As Gemma has them."""
    made = sentencepiece()
    made.add_tokens(["\u2581\u2581\u2581"])
    pieces = TokenBytes(wrapped(made))
    assert pieces[made.token_to_id("\u2581\u2581\u2581")] == b"   "


def test_ids_that_are_no_token_stand_for_nothing() -> None:
    tokenizer = wrapped(byte_level())
    pieces = TokenBytes(tokenizer)
    assert pieces.size == len(tokenizer)
    for token in (-1, len(tokenizer), 10**6):
        assert pieces[token] == b""
    known = pieces.known(len(tokenizer) + 7)
    assert known.sum() == len(tokenizer)
    assert not known[-7:].any()


def test_without_a_tokenizer_an_id_is_its_number() -> None:
    pieces = TokenBytes(None)
    assert pieces.text([3, 14]) == " 3 14"
    assert np.array_equal(pieces.known(4), [True] * 4)
    assert pieces.all() == []
