"""Labels of tokens: facts of small documents, through the demo's tokenizer or in pieces that are written here."""

import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import tree_sitter
import tree_sitter_python
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import saebench.demo
from saebench.index import IndexConfig
from saebench.labels import LABELLERS, Block, Labeller, Stream, Stretch, label, labeller_of, linguistics, syntax
from saebench.labels.prose import NEAR
from saebench.labels.stretch import Passage
from saebench.labels.tokens import is_token
from saebench.pieces import TokenBytes
from saebench.text import Document, encoder_of, pack

DEMO = Path(saebench.demo.__file__).parent / "model"
TOKENIZER = AutoTokenizer.from_pretrained(DEMO)
TEXTS = TokenBytes(TOKENIZER).all()


def packed(*texts: str, length: int = 64) -> Stream:
    """The stream that a harvest of these documents would store."""
    documents = (Document(number, f"{number}.py", str(number), text) for number, text in enumerate(texts))
    contexts = list(pack(documents, encoder_of(TOKENIZER), length, validation_fraction=1e-9))
    return Stream(*(np.concatenate([getattr(context, name) for context in contexts]) for name in Stream._fields))


def stretch(
    stream: Stream, names: dict[int, str], rows: np.ndarray | None = None, texts: Sequence[bytes] = TEXTS
) -> Stretch:
    return Stretch(stream, texts, names, np.arange(len(stream.tokens)) if rows is None else rows)


def of_text(text: str, name: str = "a.py", length: int = 64) -> dict[str, list[str]]:
    """literal -> the tokens of a document on which it holds."""
    return by_literal(stretch(packed(text, length=length), {0: name}))


def of_pieces(
    *pieces: str | bytes, name: str = "a.txt", position: Sequence[int] = (), labellers: Sequence[Labeller] = LABELLERS
) -> dict[str, list[str]]:
    """The same of a document whose tokens are these; `<s>` is a special one."""
    return by_literal(of_tokens(*pieces, name=name, position=position), labellers)


def of_tokens(*pieces: str | bytes, name: str = "a.txt", position: Sequence[int] = ()) -> Stretch:
    parts = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]
    texts = list(dict.fromkeys(parts))
    tokens, n = np.array([texts.index(part) for part in parts], np.int64), len(parts)
    keep = np.array([part != b"<s>" for part in parts], bool)
    places = np.array(position or np.arange(n), np.int64)
    return stretch(Stream(tokens, np.zeros(n, np.int64), places, keep), {0: name}, texts=texts)


def by_literal(one: Stretch, labellers: Sequence[Labeller] = LABELLERS) -> dict[str, list[str]]:
    found = label([one], labellers)
    assert found.holds.shape == (len(one.rows), len(found.names))
    assert len(set(found.names)) == len(found.names)
    by_name: dict[str, list[str]] = defaultdict(list)
    rows, columns = found.holds.nonzero()
    for row, column in sorted(zip(rows.tolist(), columns.tolist(), strict=True)):
        text = one.texts[one.stream.tokens[one.rows[row]]]
        by_name[found.names[column]].append(text.decode(errors="replace"))
    assert set(by_name) == set(found.names)  # a column that never holds is not made
    return by_name


def joined(tokens: list[str]) -> str:
    return "".join(tokens)


SOURCE = '''"""Module text."""
import os.path

# a comment

@wraps(fn)
class Shape(Base):
    """Class text."""

    def area(self, width=2):
        """Method text."""
        try:
            total = self.scale(width, unit="cm")[0]
        except ValueError:
            raise
        return f"{total} 'x'"
'''


def test_roles_of_names() -> None:
    found = of_text(SOURCE)
    assert joined(found["role: function name"]) == " area"
    assert joined(found["role: class name"]) == " Shape"
    assert joined(found["role: parameter"]) == "self width"
    assert joined(found["role: keyword argument"]) == " unit"
    assert joined(found["role: attribute"]) == joined(found["role: called method"]) == "scale"
    assert joined(found["role: called name"]) == "wraps"
    assert joined(found["role: imported name"]) == " os.path"
    assert joined(found["role: assigned name"]).strip() == "total"
    assert found["after role: class name"] == [*found["role: class name"][1:], "("]


def test_places_in_the_tree() -> None:
    found = of_text(SOURCE)
    assert joined(found["inside docstring"]) == '"""Module text."""' + ' """Class text."""' + ' """Method text."""'
    assert joined(found["inside decorator"]) == "wraps(fn)"
    assert joined(found["inside bases of a class"]) == "Base"
    assert joined(found["inside default value"]) == "2"
    assert joined(found["inside subscript"]) == "0"
    assert joined(found["inside except clause"]).split() == ["except", "ValueError:", "raise"]
    assert joined(found["inside try body"]).strip() == 'total = self.scale(width, unit="cm")[0]'
    assert joined(found["statement: return_statement"]).strip() == "return f\"{total} 'x'\""
    assert joined(found["statement: assignment"]).strip() == 'total = self.scale(width, unit="cm")[0]'
    assert joined(found["parent: default_parameter"]) == " width2"
    assert joined(found["parent: subscript"]) == "0"
    assert joined(found["node: raise_statement"]) == " raise"


def test_lexemes_and_brackets() -> None:
    found = of_text(SOURCE)
    assert joined(found["inside comment"]) == "# a comment"
    assert joined(found["inside f-string"]) == " f\"{total} 'x'\""
    assert joined(found["inside string"]).endswith(
        """cm") f"{total} 'x'\""""
    )  # a token lies where its first character does
    assert found["keyword: def"] == [" def"]
    assert joined(found["lexeme: number"]) == "20"
    assert joined(of_text("f(a, [b, c])\n")["bracket depth 2"]) == " [b, c"  # what is open once the token is read
    assert joined(of_text("f(a, [b, c])\n")["innermost bracket ("]) == "(a,"


def test_lines() -> None:
    found = of_text("if a:\n    b = 1\n\n    # c\nd\n")
    assert found["first of line"] == ["if", " b", " #", "d"]
    assert joined(found["line indent <= 0"]).startswith("if a:")
    assert joined(found["line indent <= 0"]).endswith("d\n")
    assert " b" not in found["line indent <= 0"]
    assert " b" in found["line indent <= 4"]


def test_classes_of_tokens() -> None:
    found = of_text("Error = JSON + max_size - 12\n", name="a.txt")
    assert found["class: capitalised"] == ["Error"]
    assert found["class: all capitals"] == [" JSON"]
    assert joined(found["class: number"]).strip() == "12"
    assert found["class: arithmetic"] == [" +", " -"]
    assert "_" in found["class: has underscore"]
    assert found["class: line break"] == ["\n"]
    broken = of_text("\U00013000", name="a.txt")  # in no vocabulary: its bytes are tokens of their own
    assert len(broken["class: not whole characters"]) > 1
    assert "class: word" not in broken


def test_tokens_in_any_case_and_what_they_begin_and_end_with() -> None:
    found = of_pieces("The", " the", " The", "\n", " Theme")
    assert found['token "The"'] == ["The"]
    assert found['token " the"'] == [" the"]
    assert found['token "the" in any case'] == ["The", " the", " The"]
    assert 'token "theme" in any case' not in found  # the token says it
    assert found['token starts with "the"'] == [" Theme"]
    assert found['token ends with "me"'] == [" Theme"]
    assert found['after token "the" in any case'] == [" the", " The", "\n"]


def test_the_two_tokens_before_make_a_pair_if_both_have_something_to_read() -> None:
    found = of_pieces(" a", "B", " c", "\n", "d", "e")
    assert found['after tokens "a" "b"'] == [" c"]
    assert found['after tokens "b" "c"'] == ["\n"]
    assert not any("\\n" in name for name in found if name.startswith("after tokens"))
    assert found['after token "\\n"'] == ["d"]


def test_a_token_and_the_one_before_it_make_a_pair_byte_by_byte() -> None:
    found = of_pieces(" a", "B", "\n", " a", " B", "B")
    assert found['tokens " a" "B"'] == ["B"]
    assert found['tokens " a" " B"'] == [" B"]
    assert found['tokens "B" "\\n"'] == ["\n"]
    assert found['tokens "\\n" " a"'] == [" a"]
    assert len([name for name in found if name.startswith("tokens ")]) == 5
    assert not any(map(is_token, (name for name in found if name.startswith("tokens "))))


def test_bytes_that_are_no_characters_are_told_one_by_one() -> None:
    found = of_pieces(b"\xe2", b"\x82", b"\xac", b"\xff", "x")
    assert found["token b'\\xff'"] == found["token b'\\xe2'"] == ["\ufffd"]
    assert len(found["class: not whole characters"]) == 4
    assert not [name for name in found if "\ufffd" in name]
    assert found['word "x"'] == ["x"]


def test_which_literals_name_one_token() -> None:
    found = of_pieces(" a", "A", '"', ' in any case"', b"\xff", "x\n", "'")
    assert [name for name in found if is_token(name)] == [
        'token " a"', 'token "A"', 'token "\\""', 'token " in any case\\""', "token b'\\xff'", 'token "x\\n"', 'token "\'"',
    ]  # fmt: skip


def test_what_is_before_ends_at_contexts_and_special_tokens() -> None:
    stream = packed("a(b)\n" * 8, length=16)
    found = label([stretch(stream, {0: "a.py"})])
    first = np.flatnonzero(stream.position == 1)
    held = found.holds.tocsr()
    after, pair, own, near = (
        [column for column, name in enumerate(found.names) if name.startswith(form)]
        for form in ("after token ", "after tokens", "tokens ", "near")
    )
    assert held[first][:, [*after, *pair, *own, *near]].nnz == 0
    assert held[first + 1][:, own].nnz == len(first)
    assert held[first + 1][:, pair].nnz == 0
    assert held[first + 1][:, after].nnz >= len(first)
    assert held[np.flatnonzero(~stream.keep)].nnz == 0


def test_syntax_goes_on_across_contexts_of_a_document() -> None:
    text = "def f(a):\n" + "".join(f"    call_{number}(a, {number})\n" for number in range(40))
    short, long = of_text(text, length=16), of_text(text, length=2048)
    for name in syntax.NAMES:
        assert short.get(name) == long.get(name), name


def test_documents_are_told_apart() -> None:
    stream = packed("x = (1,\n", "y = 2\n", length=32)
    found = by_literal(stretch(stream, {0: "a.py", 1: "b.py"}))
    assert joined(found["bracket depth 0"]).endswith("y = 2\n")
    assert joined(found["parsed as Python"]).endswith("y = 2\n")


def test_only_python_is_labelled_as_python() -> None:
    assert of_text("import os\n", name="row/7")["keyword: import"] == ["import"]
    for prose in ("Hello", "He said: import nothing.\n", "import os and see"):
        found = of_text(prose, name="row/7")
        assert not found.keys() & set(syntax.NAMES), prose
    assert of_text("He said (x\n", name="a.py")["bracket depth 1"]  # its name says that it is


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_line_endings_tabs_and_form_feeds(ending: str) -> None:
    text = "\x0cdef f(a):\n\tif a:\n\t\treturn 'é' + a.real\n\x0c\ndef g(b): pass\n".replace("\n", ending)
    found = of_text(text)
    assert joined(found["role: function name"]) == " f g"
    assert joined(found["role: parameter"]) == "ab"
    assert joined(found["role: attribute"]) == "real"
    assert joined(found["operator: +"]) == " +"


def test_a_document_cut_at_its_end_keeps_what_came_before() -> None:
    found = of_text("import os\n\ndef f(a):\n    return a\n\n@wraps\ndef g(b):\n    x = '''cut")
    assert joined(found["role: parameter"]) == "ab"
    assert joined(found["role: function name"]) == " f g"  # what follows an error, and what is in it, is read as well
    assert joined(found["parsed as Python"]).startswith("import os\n\ndef f(a):\n    return a\n\n")


def test_a_document_cut_at_its_start_is_read_from_the_next_statement() -> None:
    found = of_text('ends here.\n    """\n    return 1\n\ndef g(b):\n    return b\n')
    assert joined(found["role: parameter"]) == "b"


def test_byte_order_mark_nul_and_bytes_that_are_no_text() -> None:
    source = b"\xef\xbb\xbfx = '\xff\0\xe2\x82'\ny(x)\n"
    start = np.arange(len(source))
    pieces = syntax.Pieces(source, start, start + 1, start)
    tokens, ids = syntax.label_source(pieces, named_python=True)
    held = {
        name: source[tokens[ids == number].min()] for number, name in enumerate(syntax.NAMES) if (ids == number).any()
    }
    assert chr(held["role: assigned name"]) == "x"
    assert chr(held["role: called name"]) == "y"
    assert chr(held["inside string"]) == "'"


@pytest.mark.parametrize(
    "text", ["(" * 3000, "-" * 4_000 + "1", "1" + "+1" * 4_000, "a" + ".b" * 4_000, "x = " + "[" * 150 + "]" * 150, "1" * 9000, "\\", "'", "$ ?"]
)  # fmt: skip
def test_source_that_defeats_the_parser_is_labelled_as_far_as_it_goes(text: str) -> None:
    of_text("x = 1\n" + text + "\ny = 2\n")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60), st.booleans())
def test_no_bytes_crash_and_every_label_is_of_a_token(source: bytes, named: bool) -> None:
    start = np.arange(0, max(len(source), 1), 2)
    end = np.minimum(start + 2, len(source))
    tokens, ids = syntax.label_source(syntax.Pieces(source, start, end, start), named)
    assert len(tokens) == len(ids)
    assert ((tokens >= 0) & (tokens < len(start)) & (ids >= 0) & (ids < len(syntax.NAMES))).all()


def test_the_text_of_a_document_is_recovered_byte_by_byte() -> None:
    text = "π = 'naïve 漢字 \U0001f40d'\n\tx\r\n"
    stream = packed(text, "second\n", length=8)
    assert [passage.pieces.source.decode() for passage in stretch(stream, {}).passages] == [text, "second\n"]


BROKEN = (
    'ends here)\n    """\n    return [1\n\nclass A(B, m=(1,)):\n    def g(self, *b): return f(b[0].c(\'x\'), {1: (2)}\n'
)


@pytest.mark.parametrize("every", [1, 2, 7, 31])
def test_labels_of_some_rows_are_those_of_all_at_these_rows(every: int) -> None:
    """Of whole and of broken source, prose, and documents of which no row is asked for."""
    stream = packed(
        SOURCE, BROKEN, "x = 1\n", "Not a program: (prose", Path(syntax.__file__).read_text()[7000:14000], SOURCE[7:-9]
    )
    names = {0: "a.py", 1: "b.py", 4: "e.py", 5: "f.py"}
    every_literal = label([stretch(stream, names)])
    everything = every_literal.holds.tocsr()
    for first in range(min(every, 3)):
        rows = np.arange(first, len(stream.tokens), every)
        some = label([stretch(stream, names, rows)], only=every_literal.names).holds.tocsr()
        differ = (some != everything[rows]).tocoo()
        assert not differ.nnz, (rows[differ.row[0]], every_literal.names[differ.col[0]])
    none = label([stretch(stream, names, rows[:0])], only=every_literal.names)
    assert none.holds.shape == (0, len(every_literal.names))


@pytest.mark.parametrize("text", ["a = 1\n\n\nb = (2,\n", BROKEN])
def test_a_token_alone_has_the_labels_it_has_among_all(text: str) -> None:
    source = text.encode()
    start = np.arange(len(source))
    pieces = syntax.Pieces(source, start, start + 1, start)
    tokens, ids = syntax.label_source(pieces, True)
    for token in start:
        alone, found = syntax.label_source(pieces, True, start == token)
        assert (alone == token).all()
        assert set(found) == set(ids[tokens == token]), token


def test_little_of_a_tree_is_walked_for_few_tokens() -> None:
    source = b"x = f(a, [b])\n" * 500
    root, everywhere = syntax.parse(source), np.arange(len(source))
    few, every = syntax._Seen(everywhere[:3], everywhere[:3] + 1), syntax._Seen(everywhere, everywhere + 1)
    for seen in (few, every):
        seen.walk(root)
    assert len(few.nodes) == 4  # the module, its first statement, the assignment and its name
    assert len(every.nodes) > 1000


def test_labels_do_not_depend_on_the_interpreter() -> None:
    """Syntax of every version, some of it newer than the oldest interpreter, with one tree for all of them."""
    text = (
        "def f[T](a: T, /) -> T:\n    match a:\n        case {'k': [x, *_]} if x: return f'{a!r:>{x}} {f\"{x}\"}'\n"
        "type Pair = tuple[int, int]\ntry: pass\nexcept* OSError as e: print(e) if (n := 2) else 1_000j\n"
    )
    source = text.encode()
    start = np.arange(len(source))
    tokens, ids = syntax.label_source(syntax.Pieces(source, start, start + 1, start), named_python=True)
    digest = hashlib.sha256(
        json.dumps([syntax.NAMES, sorted(zip(tokens.tolist(), ids.tolist(), strict=True))]).encode()
    )
    assert digest.hexdigest()[:16] == "8e88b8cf7790807f", (
        "labels changed: the version of `python` in LABELLERS must, too"
    )


def test_every_kind_of_node_of_the_grammar_has_a_literal() -> None:
    """Whichever of them this interpreter's own library has."""
    grammar = tree_sitter.Language(tree_sitter_python.language())
    kinds = {
        grammar.node_kind_for_id(number)
        for number in range(grammar.node_kind_count)
        if grammar.node_kind_is_named(number) and grammar.node_kind_is_visible(number)
    } - {"ERROR"}
    assert len(kinds) > 100
    assert {f"node: {kind}" for kind in kinds} <= set(syntax.NAMES)


# ------------------------------------------------------------------------------------------------ prose


def test_words_are_whole_across_their_pieces_and_case() -> None:
    found = of_pieces("Un", "believ", "able", " unbelievable", "!", " Don", "'t", " x")
    assert found['word "unbelievable"'] == ["Un", "believ", "able", " unbelievable"]
    assert found['word "don\'t"'] == [" Don", "'t"]
    assert found['word starts with "unb"'] == found['word ends with "able"'] == found['word "unbelievable"']
    assert 'word starts with "x"' not in found
    assert found["first piece of a long word"] == ["Un", " Don"]
    assert found["inside a word"] == ["believ"]
    assert found["last piece of a long word"] == ["able", "'t"]
    assert found['after word "unbelievable"'] == [" unbelievable", "!", " Don", "'t"]


def test_typographic_marks_are_no_letters() -> None:
    found = of_pieces("“", "Hello", "”", "—", "naïve", "…", " Привет", "，", "世界", "。", "×", "5")
    words = {name for name in found if name.startswith("word ") and " with " not in name}
    assert words == {'word "hello"', 'word "naïve"', 'word "привет"', 'word "世界"', 'word "5"'}
    assert of_pieces("wife", "’", "s")['word "wife’s"'] == ["wife", "’", "s"]


def test_a_context_that_begins_within_a_word_has_the_rest_of_the_word() -> None:
    found = of_pieces("<s>", " nearby", " unbeliev", "<s>", "able", " x", position=[0, 1, 2, 0, 1, 2])
    assert found['word "unbelievable"'] == [" unbeliev", "able"]
    assert found['near word "unbelievable"'] == [" x"]  # and nothing of the context before
    assert found['near word "nearby"'] == [" unbeliev"]


def test_near_words_are_of_some_letters_and_as_many_tokens_before() -> None:
    found = of_pieces("elephant", *(f" {number}" for number in range(100, 100 + NEAR + 3)), " cat", " z")
    assert found['near word "elephant"'] == [f" {number}" for number in range(100, 100 + NEAR)]
    assert 'near word "cat"' not in found


def test_places_in_a_sentence_and_a_paragraph() -> None:
    found = of_pieces(
        "The", " cat", " saw", " Bob", ".", " It", " ran", "!", " “", "No", "”", "\n\n", "End", " of", " it"
    )
    assert found["first word of a sentence"] == ["The", " It", "No", "End"]
    assert found["among the first 2 words of a sentence"] == ["The", " cat", " It", " ran", "No", "End", " of"]
    assert found["capitalised name"] == [" Bob"]
    assert found["first sentence of a paragraph"][:5] == ["The", " cat", " saw", " Bob", "."]
    assert "End" in found["first sentence of a paragraph"]
    assert " It" not in found["first sentence of a paragraph"]
    assert found["after a word"] == [".", "!", " “", "”", "\n\n"]
    assert of_pieces("So", " Mr", ".", " Lee", " and", " J", ".", " Doe")["first word of a sentence"] == ["So"]
    assert "capitalised name" not in of_pieces("So", " I", " am")


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_marks_of_layout(ending: str) -> None:
    text = "# Title\n\nSome text here.\n\n- one item\n* two\n\u2022 three\n1. four\n\nUnder\n=====\n\nPART TWO\n\n12, 14\nplain\n"
    pieces = text.replace("\n", ending).replace(ending, f"|{ending}|").replace(" ", "| ").split("|")
    found = of_pieces(*filter(None, pieces))
    assert [token.strip() for token in found["heading"]] == ["#", "Title", "Under", "PART", "TWO"]
    assert [token.strip() for token in found["list item"]] == [
        "-",
        "one",
        "item",
        "*",
        "two",
        "•",
        "three",
        "1.",
        "four",
    ]
    assert {"#", "Some", "-", "Under", "PART"} <= set(found["first sentence of a paragraph"])


def test_markup_addresses_brackets_and_quotes() -> None:
    found = of_pieces(
        "<b>",
        "bold",
        "</b>",
        " &amp;",
        " see",
        " https://x.org/a",
        " or",
        " me@x.org",
        " (",
        "now",
        ")",
        ' "',
        "yes",
        '"',
    )
    assert joined(found["markup"]) == "<b></b> &amp;"
    assert joined(found["address"]) == " https://x.org/a me@x.org"
    assert joined(found["in brackets"]) == " (now)"
    assert joined(found["in quotes"]) == ' "yes"'
    of_pieces("a" * 200_000)  # which no pattern reads twice


def test_dates_years_and_numbers() -> None:
    found = of_pieces(
        "On",
        " 5",
        " May",
        " 1945",
        ",",
        " in",
        " 1999",
        " and",
        " 2024-01-31",
        ",",
        " 3,500",
        " of",
        " seven",
        " in",
        " XIV",
        " e.g.",
        " 1066",
    )
    assert joined(found["date"]) == " 5 May 1945 2024-01-31"
    assert found["year"] == [" 1945", " 1999", " 2024-01-31", " 1066"]
    assert found["number"] == [" 5", " 1945", " 1999", " 2024-01-31", " 3,500", " 1066"]
    assert found["number in words"] == [" seven"]
    assert found["roman numeral"] == [" XIV"]
    assert found["abbreviation"] == [" e.g."]


def test_the_language_of_a_passage() -> None:
    german = "Der Hund läuft über die Straße und sieht eine Katze, die auf dem Dach schläft."
    assert len(of_pieces(*german.split(" "))["language: de"]) == len(german.split(" "))
    for pieces, name in (("x = 1",), "a.txt"), (german.split(" "), "a.py"):
        assert not [literal for literal in of_pieces(*pieces, name=name) if literal.startswith("language")]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(max_size=6), max_size=12), st.booleans())
def test_any_tokens_are_labelled(pieces: list[bytes], named: bool) -> None:
    """Also none, white space alone, tokens without text, and bytes that are no characters."""
    of_pieces(*pieces, name="a.py" if named else "a.txt")


@pytest.mark.parametrize("pieces", [(), ("",), ("", ""), (" ",), ("\n\n", " \t"), ("<s>", "<s>"), ("\r\n",)])
def test_documents_that_say_nothing(pieces: tuple[str, ...]) -> None:
    found = of_pieces(*pieces)
    assert not [name for name in found if name.startswith(("word", "near", "language", "after word", "role"))]


def test_ids_beyond_the_tokenizer_have_no_text() -> None:
    """As padded embeddings have them, in text that a model wrote."""
    one = of_tokens("ab", "cd", "ef")
    beyond = one.stream._replace(tokens=np.array([0, 50_000, 2], np.int64))
    found = label([Stretch(beyond, one.texts, one.documents, one.rows)])
    words = dict(zip(found.names, found.holds.toarray().T.tolist(), strict=True))
    assert words['word "abef"'][0::2] == [True, True]
    assert 'token "cd"' not in words
    assert [name for name in words if name.startswith("after token")] == ['after token "ab"']


# ------------------------------------------------------------------------------------------- literals


def test_literals_of_names_hold_where_they_held_when_they_were_found() -> None:
    texts = [SOURCE, "The end of it. See https://x.org, 5 May 1945.\n"]
    one = stretch(packed(*texts), {0: "a.py", 1: "b.txt"})
    found = label([one])
    picks = np.random.default_rng(0).permutation(len(found.names))[:80]
    again = label([one], only=[found.names[number] for number in picks])
    assert again.names == [found.names[number] for number in picks]
    assert again.of.tolist() == found.of[picks].tolist()
    assert not (again.holds != found.holds[:, picks]).nnz
    other = label([of_tokens("z")], only=['word "nowhere"', 'token "z"'])
    assert other.holds.toarray().tolist() == [[False, True]]
    assert other.of.tolist() == [-1, 1]


def test_a_literal_of_two_stretches_is_one_column() -> None:
    one, two = of_tokens("cat", " sat"), of_tokens(" dog", " sat", " cat")
    found = label([one, two])
    column = found.names.index('token " sat"')
    assert np.flatnonzero(found.holds[:, [column]].toarray()).tolist() == [1, 3]
    assert np.flatnonzero(found.holds[:, [found.names.index('word "cat"')]].toarray()).tolist() == [0, 4]
    assert found.of.tolist() == sorted(found.of.tolist())


def test_a_literal_holds_often_enough_to_be_one() -> None:
    one = of_tokens("a", "b", "a", "b", "a")
    counts = {least: label([one], least=least) for least in (1, 2, 3)}
    for least, found in counts.items():
        held = np.diff(found.holds.indptr)
        assert held.min() >= least
        every = counts[1]
        assert found.names == [
            name for name, n in zip(every.names, np.diff(every.holds.indptr), strict=True) if n >= least
        ]
    assert 'token "a"' in counts[3].names
    assert 'token "b"' not in counts[3].names


def test_no_stretch_has_no_literal() -> None:
    assert label([]).holds.shape == (0, 0)
    assert label([], only=['token "a"']).holds.shape == (0, 1)


def test_two_labellers_do_not_call_literals_the_same() -> None:
    def says(one: Stretch) -> Iterator[Block]:
        yield Block(["red"], np.zeros(1, np.int64), np.zeros(1, np.int64))

    pair = (Labeller("one", "1", says), Labeller("two", "1", says))
    with pytest.raises(ValueError, match="'red' is a literal of 'one' and 'two'; expected names of their own"):
        label([of_tokens("a")], pair)
    assert label([of_tokens("a")], pair, only=["blue"]).holds.nnz == 0


def test_a_labeller_that_is_not_there_is_named() -> None:
    assert labeller_of("tokens") is LABELLERS[1]
    with pytest.raises(ValueError, match="'poetry' is no labeller; there are python, tokens, prose, spacy:PIPELINE"):
        labeller_of("poetry")


# --------------------------------------------------------------------------------------- linguistics

WORDNET = {  # as wndb(5WN) has it: a licence, then lemma, part, synsets, pointers, senses, those met in text, offsets
    "index.noun": "  1 This software and database is being provided\nriver n 1 1 @ 1 1 00000100  \ndog n 2 1 @ 2 1 00000200 00000100  \nwa n 1 0 1 0 00000100  \n",
    "data.noun": "  1 This software and database is being provided\n00000100 17 n 01 river 0 000 | water  \n00000200 05 n 01 dog 0 000 | bark  \n",
    "noun.exc": "hounds dog\n",
    "index.verb": "be v 1 0 1 1 00000300  \nriver v 1 0 1 0 00000300  \n",
    "data.verb": "00000300 42 v 01 be 0 000 | exist  \n",
    "verb.exc": "was be\n",
    **dict.fromkeys(("index.adj", "data.adj", "adj.exc", "index.adv", "data.adv", "adv.exc"), ""),
}


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    for name, text in WORDNET.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_supersenses_are_of_the_first_sense_of_a_words_lemma(wordnet: Path) -> None:
    found = of_pieces(
        "Riv", "ers", " Dog", "’s", " hounds", " was", " cats", labellers=[labeller_of(f"wordnet:{wordnet}")]
    )
    assert dict(found) == {
        "supersense: noun.object": ["Riv", "ers"],  # and no verb, as which no text has it
        "supersense: noun.animal": [" Dog", "’s", " hounds"],
        "supersense: verb.stative": [" was"],  # and not the plural of "wa"
    }


def test_a_wordnet_is_told_by_its_files(wordnet: Path) -> None:
    before = labeller_of(f"wordnet:{wordnet}").version
    (wordnet / "noun.exc").write_text("hounds dog\npuppies dog\n")
    linguistics._wordnet.cache_clear()
    assert labeller_of(f"wordnet:{wordnet}").version != before


@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_a_directory_without_a_wordnet_is_refused_by_name(wordnet: Path, damage: str) -> None:
    data = wordnet / "data.noun"
    if damage == "missing":
        data.unlink()
    else:
        data.write_text("" if damage == "empty" else WORDNET["data.noun"][:-60])
    with pytest.raises(ValueError, match=f"{wordnet} is no directory of WordNet's database files"):
        labeller_of(f"wordnet:{wordnet}")


def test_what_an_index_is_asked_for_is_looked_for_first(wordnet: Path) -> None:
    extra = IndexConfig(sae=wordnet, wordnet=wordnet).labellers()[len(LABELLERS) :]
    assert [labeller.name for labeller in extra] == [f"wordnet:{wordnet}"]
    with pytest.raises(ValueError, match="is no directory of WordNet's"):
        IndexConfig(sae=wordnet, wordnet=wordnet / "nowhere").labellers()


def test_without_spacy_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ValueError, match=r"^spaCy labels 'en_core_web_sm' with: pip install 'saebench\[prose\]'$"):
        IndexConfig(sae=Path("a"), spacy="en_core_web_sm").labellers()


@pytest.fixture(scope="module")
def spacy_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spacy = pytest.importorskip("spacy", reason="spaCy is not installed: pip install 'saebench[prose]'")
    nlp = spacy.blank("en")
    rules = nlp.add_pipe("attribute_ruler")
    rules.add([[{"LOWER": "dogs"}]], {"POS": "NOUN", "LEMMA": "dog"})
    nlp.add_pipe("entity_ruler").add_patterns([{"label": "GPE", "pattern": "New York"}])
    folder = tmp_path_factory.mktemp("spacy") / "pipeline"
    nlp.to_disk(folder)
    return folder


def test_spacy_labels_every_piece_of_its_tokens(spacy_pipeline: Path) -> None:
    labeller = labeller_of(f"spacy:{spacy_pipeline}")
    assert labeller.version.startswith("1 en_pipeline ")
    found = of_pieces("é", b"\xff", " Do", "gs", " in", " New", " York", "\n", labellers=[labeller])
    assert found["part of speech: NOUN"] == found["lemma: dog"] == [" Do", "gs"]
    assert found["entity: GPE"] == [" New", " York"]
    with pytest.raises(ValueError, match="'no_pipeline' is no pipeline that spaCy finds"):
        labeller_of("spacy:no_pipeline")


@pytest.mark.parametrize("filling", [" dogs", "x", "\n\ndogs"])
def test_spacy_is_given_long_texts_in_portions(spacy_pipeline: Path, filling: str) -> None:
    pieces = (
        "dogs ",
        filling * (1_100_000 if filling == "x" else 9_000),
        " dogs",
    )  # spaCy itself refuses more than 1,000,000 letters
    held = of_pieces(*pieces, labellers=[labeller_of(f"spacy:{spacy_pipeline}")])["lemma: dog"]
    assert (held[0], held[-1]) == ("dogs ", " dogs")


def test_portions_of_a_long_text_are_all_of_it() -> None:
    for text in (b"word " * 20_000, b"x" * 100_000, b"line\n" * 9_000, b"par\n\n" * 9_000, b"short", b""):
        nowhere = np.zeros(0, np.int64)
        portions = list(
            linguistics._portions(Passage("", syntax.Pieces(text, nowhere, nowhere, nowhere), nowhere, nowhere))
        )
        assert b"".join(text[start:stop] for start, stop in portions) == text
        assert all(stop - start <= 2 * linguistics._AT_ONCE for start, stop in portions)
        assert all(text[stop - 1 : stop].isspace() for _, stop in portions[:-1]) or text[:2] == b"xx"
