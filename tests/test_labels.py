"""Labels of tokens: facts of small documents, through the demo's tokenizer."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import tree_sitter
import tree_sitter_python
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import saebench.demo
from saebench.labels import Stream, Vocabulary, choose_literals, label, syntax
from saebench.labels.literals import _documents
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


def of_text(text: str, name: str = "a.py", length: int = 64) -> dict[str, list[str]]:
    """literal -> the tokens of a document on which it holds."""
    stream = packed(text, length=length)
    return by_literal(stream, {0: name})


def by_literal(stream: Stream, names: dict[int, str]) -> dict[str, list[str]]:
    vocabulary = choose_literals(stream, TEXTS, least=1)
    matrix = label(stream, vocabulary, names)
    assert matrix.shape == (len(stream.tokens), len(vocabulary.names))
    assert len(set(vocabulary.names)) == len(vocabulary.names)
    found: dict[str, list[str]] = {name: [] for name in vocabulary.names}
    rows, columns = matrix.nonzero()
    for row, column in sorted(zip(rows.tolist(), columns.tolist(), strict=True)):
        found[vocabulary.names[column]].append(TEXTS[stream.tokens[row]].decode(errors="replace"))
    return found


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
    assert broken["class: word"] == []


def test_what_is_before_ends_at_contexts_and_special_tokens() -> None:
    stream = packed("a(b)\n" * 8, length=16)
    vocabulary = choose_literals(stream, TEXTS, least=1)
    matrix = label(stream, vocabulary, {0: "a.py"})
    first = np.flatnonzero(stream.position == 1)
    before = [column for column, name in enumerate(vocabulary.names) if name.startswith(("previous", 'after "'))]
    assert matrix[first][:, before].nnz == 0
    assert matrix[first + 1][:, before].nnz == len(first)  # one previous token, no pair
    assert matrix[np.flatnonzero(~stream.keep)].nnz == 0


def test_syntax_goes_on_across_contexts_of_a_document() -> None:
    text = "def f(a):\n" + "".join(f"    call_{number}(a, {number})\n" for number in range(40))
    short, long = of_text(text, length=16), of_text(text, length=2048)
    for name in syntax.NAMES:
        assert short[name] == long[name], name


def test_documents_are_told_apart() -> None:
    stream = packed("x = (1,\n", "y = 2\n", length=32)
    found = by_literal(stream, {0: "a.py", 1: "b.py"})
    assert joined(found["bracket depth 0"]).endswith("y = 2\n")
    assert joined(found["parsed as Python"]).endswith("y = 2\n")


def test_only_python_is_labelled_as_python() -> None:
    assert of_text("import os\n", name="row/7")["keyword: import"] == ["import"]
    for prose in ("Hello", "He said: import nothing.\n", "import os and see"):
        found = of_text(prose, name="row/7")
        assert not any(found[name] for name in syntax.NAMES), prose
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
    sources = [pieces.source.decode() for _, pieces in _documents(stream, TEXTS, np.arange(len(stream.tokens)))]
    assert sources == [text, "second\n"]


def test_frequent_tokens_become_literals_and_ties_go_to_the_smaller_id() -> None:
    stream = packed("a b a b a\n")
    counts = dict(zip(*np.unique(stream.tokens[stream.keep], return_counts=True), strict=True))
    best = sorted(counts, key=lambda token: (-counts[token], token))
    chosen = choose_literals(stream, TEXTS, tokens=2, previous=1, bigrams=1, least=1)
    assert chosen.tokens.tolist() == sorted(best[:2])
    assert choose_literals(stream, TEXTS, least=3).bigrams.tolist() == []
    names = chosen.names
    assert names[0] == f"token is {json.dumps(TEXTS[chosen.tokens[0]].decode())}"


def test_a_vocabulary_gives_every_stream_the_same_columns() -> None:
    vocabulary = choose_literals(packed(SOURCE), TEXTS, least=1)
    other = packed("z\n")
    assert label(other, vocabulary, {0: "z.py"}).shape[1] == len(vocabulary.names)
    empty = Stream(*(column[:0] for column in other))
    assert label(empty, Vocabulary(TEXTS, *(np.empty(shape, int) for shape in (0, 0, (0, 2)))), {}).shape[0] == 0


BROKEN = (
    'ends here)\n    """\n    return [1\n\nclass A(B, m=(1,)):\n    def g(self, *b): return f(b[0].c(\'x\'), {1: (2)}\n'
)


@pytest.mark.parametrize("every", [1, 2, 7, 31])
def test_labels_of_some_rows_are_those_of_all_at_these_rows(every: int) -> None:
    """Of whole and of broken source, prose, and documents of which no row is asked for."""
    stream = packed(SOURCE, BROKEN, "x = 1\n", "Not a program: (prose", Path(syntax.__file__).read_text(), SOURCE[7:-9])
    vocabulary = choose_literals(stream, TEXTS, least=1)
    names = {0: "a.py", 1: "b.py", 4: "e.py", 5: "f.py"}
    everything = label(stream, vocabulary, names)
    for first in range(min(every, 3)):
        rows = np.arange(first, len(stream.tokens), every)
        some = label(stream, vocabulary, names, rows)
        differ = (some != everything[rows]).tocoo()
        assert not differ.nnz, (rows[differ.row[0]], vocabulary.names[differ.col[0]])
    assert label(stream, vocabulary, names, rows[:0]).shape == (0, len(vocabulary.names))


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
    assert digest.hexdigest()[:16] == "8e88b8cf7790807f", f"labels changed: {syntax.VERSION} must, too"


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
