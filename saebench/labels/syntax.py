"""Labels of Python source: what `tokenize` and `ast` say of the place of each token.

Nothing is executed. Source that is cut off or broken keeps the labels of the part that can be read:
`tokenize` stops at its first error, `ast` gets the longest run of top-level statements found in a few tries.
Legend: n tokens of one document, k labels of them.
"""

import ast
import io
import keyword
import re
import token
import tokenize
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

_TRIES = 8  # attempts to find a part that parses
_MAX_BRACKETS = 4  # depths from here on share a literal
_TREE_DEPTHS = (4, 7, 10)  # where the buckets of tree depth end

# Roles are of names, and of every token that holds a piece of the name.
_ROLES = (
    "function name", "class name", "parameter", "keyword argument", "attribute", "called name", "called method",
    "imported name", "assigned name",
)  # fmt: skip
_FUNCTIONS = ("FunctionDef", "AsyncFunctionDef")
_WHOLE = {  # what lies anywhere in such a node
    "Lambda": "lambda",
    **dict.fromkeys(("ListComp", "SetComp", "DictComp", "GeneratorExp"), "comprehension"),
}
_FIELD = {  # what lies in one field of such a node
    **{(kind, "body"): "function body" for kind in _FUNCTIONS},
    **{(kind, "decorator_list"): "decorator" for kind in (*_FUNCTIONS, "ClassDef")},
    **{(kind, "returns"): "annotation" for kind in _FUNCTIONS},
    ("arg", "annotation"): "annotation", ("AnnAssign", "annotation"): "annotation",
    ("arguments", "defaults"): "default value", ("arguments", "kw_defaults"): "default value",
    ("ClassDef", "body"): "class body", ("ClassDef", "bases"): "bases of a class",
    ("If", "test"): "condition", ("While", "test"): "condition", ("IfExp", "test"): "condition",
    ("If", "body"): "if body", ("If", "orelse"): "else branch",
    ("For", "body"): "loop body", ("AsyncFor", "body"): "loop body", ("While", "body"): "loop body",
    ("With", "body"): "with body", ("AsyncWith", "body"): "with body",
    ("Try", "body"): "try body", ("Try", "handlers"): "except clause", ("Try", "finalbody"): "finally body",
    ("Call", "args"): "call arguments", ("Call", "keywords"): "call arguments",
    ("Subscript", "slice"): "subscript",
}  # fmt: skip
_INSIDE = tuple(dict.fromkeys([*_WHOLE.values(), *_FIELD.values(), "docstring"]))
_BITS = {name: 1 << bit for bit, name in enumerate(_INSIDE)}

_PLACED = (ast.AST, ast.stmt, ast.expr, ast.excepthandler, ast.pattern)
_KINDS = (
    "Module", "arguments", "comprehension", "withitem", "match_case",
    *sorted(
        name
        for name, kind in vars(ast).items()
        if isinstance(kind, type) and kind.__base__ in _PLACED and kind not in _PLACED and "lineno" in kind._attributes
    ),
)  # fmt: skip
_STATEMENTS = tuple(kind for kind in _KINDS if issubclass(getattr(ast, kind), ast.stmt))

NAMES: tuple[str, ...] = (  # of rules that are equally good the first is taken, so the more telling come first
    "parsed as Python",
    *(f"role: {role}" for role in _ROLES),
    *(f"after role: {role}" for role in _ROLES),
    *(f"inside {place}" for place in _INSIDE),
    *(f"node: {kind}" for kind in _KINDS),
    *(f"parent: {kind}" for kind in _KINDS),
    *(f"statement: {kind}" for kind in _STATEMENTS),
    *(f"tree depth < {depth}" for depth in _TREE_DEPTHS), f"tree depth >= {_TREE_DEPTHS[-1]}",
    "lexeme: name", "lexeme: keyword", "lexeme: number", "lexeme: operator",
    "inside string", "inside f-string", "inside comment",
    *(f"keyword: {word}" for word in keyword.kwlist),
    *(f"operator: {symbol}" for symbol in sorted(token.EXACT_TOKEN_TYPES)),
    *(f"bracket depth {depth}" for depth in range(_MAX_BRACKETS)), f"bracket depth >= {_MAX_BRACKETS}",
    *(f"innermost bracket {bracket}" for bracket in "([{"),
)  # fmt: skip
_ID = {name: number for number, name in enumerate(NAMES)}
_NODE, _PARENT = ({kind: _ID[f"{what}: {kind}"] for kind in _KINDS} for what in ("node", "parent"))
_STATEMENT = {kind: _ID[f"statement: {kind}"] for kind in _STATEMENTS}
_DEPTH, _FIRST_INSIDE, _AFTER = _ID["tree depth < 4"], _ID[f"inside {_INSIDE[0]}"], len(_ROLES)
_LEXEME = {tokenize.NUMBER: _ID["lexeme: number"], tokenize.OP: _ID["lexeme: operator"], tokenize.COMMENT: _ID["inside comment"]}  # fmt: skip


_Found = tuple[np.ndarray, np.ndarray]  # token numbers, ids


class Pieces(NamedTuple):
    """A document's bytes, and its tokens as spans `[start, end)` of them, in order.

    A token lies where its `anchor` is, its first byte that is not white space (`start` where all are).
    """

    source: bytes
    start: Int[np.ndarray, " n"]
    end: Int[np.ndarray, " n"]
    anchor: Int[np.ndarray, " n"]


class _Lines(NamedTuple):
    """Lines of valid text, each ending in a line feed, and the byte where each starts in the source."""

    text: list[str]
    start: list[int]

    def byte(self, row: int, column: int) -> int:
        """Where a column, counted in characters, is; rows count from 0."""
        line = self.text[row]
        return self.start[row] + (column if line.isascii() else len(line[:column].encode()))

    def span(self, node: Any, first: int) -> tuple[int, int]:
        """First and last byte (exclusive) of a node of the tree parsed from line `first` on."""
        start = self.start[node.lineno - 1 + first] + node.col_offset
        return start, self.start[node.end_lineno - 1 + first] + node.end_col_offset


def label_source(pieces: Pieces, named_python: bool) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"]]:
    """(token numbers, indices into `NAMES`) of the labels that hold; none where the source is not Python.

    A document whose name does not say that it is Python is, when all of it parses and some statement of
    it is more than an expression (as every single word of prose is).
    """
    lines = _lines(pieces.source)
    parsed = _parse(lines.text, _TRIES if named_python else 1)
    found: list[_Found] = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    if not named_python and (parsed is None or all(isinstance(node, ast.Expr) for node in parsed[0].body)):
        return found[0]
    roles, first = [], 0
    if parsed is not None:
        tree, first, last = parsed
        end = lines.start[last] if last < len(lines.start) else len(pieces.source)
        nodes, roles = _walk(tree, lines, first, end)
        found += _node_labels(pieces, nodes)
    lexemes = _Lexemes()
    lexemes.read(lines, first)
    found += _lexeme_labels(pieces, lexemes)
    found += _role_labels(pieces, roles + lexemes.roles)
    tokens, ids = (np.concatenate(part) for part in zip(*found, strict=True))
    return tokens, ids


def _lines(source: bytes) -> _Lines:
    """The same text made valid, every character as long as before: `?` for a byte that is not UTF-8, space for NUL."""
    text = source.decode("utf-8", "surrogateescape").encode("utf-8", "replace").replace(b"\0", b" ")
    start = [0, *(match.end() for match in re.finditer(rb"\r\n?|\n", text))]
    ends = [*start[1:], len(text)]
    if text.startswith(b"\xef\xbb\xbf"):
        start[0] = 3
    return _Lines([text[a:b].decode().rstrip("\r\n") + "\n" for a, b in zip(start, ends, strict=True)], start)


# ------------------------------------------------------------------------------------------- tree


def _parse(lines: list[str], tries: int) -> tuple[ast.Module, int, int] | None:
    """(tree, first line, last line + 1) of a run of top-level statements; None where there is none.

    After an error the part before the statement that holds it is tried; where there is no such part, what follows.
    """
    heads = [row for row, line in enumerate(lines) if re.match(r"(?!(?:el(se|if)|except|finally)\b)[^\W\d]|@", line)]
    first, last = 0, len(lines)
    for _ in range(tries):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes in the source's strings
                return ast.parse("".join(lines[first:last])), first, last
        except SyntaxError as error:
            wrong = first + (error.lineno or 1) - 1
        except (RecursionError, MemoryError, ValueError):
            return None
        before = [row for row in heads if first < row <= wrong and row < last]
        after = [row for row in heads if row > wrong]
        if before:
            last = before[-1]
        elif after:
            first, last = after[0], len(lines)
        else:
            return None
    return None


_Node = tuple[int, int, int, int, int, int, int]  # start, end, ids of kind, parent, statement and depth, bits
_Role = tuple[str, int, int]  # role, start, end


def _walk(tree: ast.Module, lines: _Lines, first: int, end: int) -> tuple[list[_Node], list[_Role]]:
    """Every node, parents before children, and every name that has a role. Bytes count in the whole source."""
    nodes: list[_Node] = [(lines.start[first], end, _NODE["Module"], -1, -1, _DEPTH, 0)]
    roles: list[_Role] = []
    marked: dict[ast.AST, str] = {}  # nodes of which their parent says more: docstrings and what is called
    stack: list[tuple[ast.AST, str, int, int, int]] = [(tree, "", -1, 0, 0)]
    while stack:
        node, parent, statement, depth, bits = stack.pop()
        kind = type(node).__name__
        if isinstance(node, ast.stmt):
            statement = _STATEMENT.get(kind, -1)
        bits |= _BITS.get(_WHOLE.get(kind, marked.get(node, "")), 0)
        if "lineno" in node._attributes:
            start, stop = lines.span(node, first)
            nodes.append((start, stop, _NODE.get(kind, -1), _PARENT.get(parent, -1), statement, _bucket(depth), bits))
            roles += _roles(node, start, stop, marked.get(node, ""))
        _mark(node, marked)
        if kind in ("JoinedStr", "TemplateStr"):  # places inside f-strings are not reliable before Python 3.12
            continue
        for field, value in ast.iter_fields(node):
            inner = bits | _BITS.get(_FIELD.get((kind, field), ""), 0)
            children = value if isinstance(value, list) else (value,)
            stack += [(child, kind, statement, depth + 1, inner) for child in children if isinstance(child, ast.AST)]
    return nodes, roles


def _bucket(depth: int) -> int:
    return _DEPTH + sum(depth >= limit for limit in _TREE_DEPTHS)


def _mark(node: ast.AST, marked: dict[ast.AST, str]) -> None:
    if isinstance(node, ast.Call):
        marked[node.func] = "called"
    elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
        opening = node.body[0].value if isinstance(node.body[0], ast.Expr) else None
        if isinstance(opening, ast.Constant) and isinstance(opening.value, str):
            marked[opening] = "docstring"


def _roles(node: ast.AST, start: int, end: int, mark: str) -> Iterator[_Role]:
    match node:
        case ast.Name():
            if mark == "called":
                yield "called name", start, end
            elif isinstance(node.ctx, ast.Store):
                yield "assigned name", start, end
        case ast.Attribute():
            begin = end - len(node.attr.encode())
            yield "attribute", begin, end
            if mark == "called":
                yield "called method", begin, end
        case ast.arg():
            yield "parameter", start, start + len(node.arg.encode())
        case ast.keyword(arg=str(name)):
            yield "keyword argument", start, start + len(name.encode())
        case ast.alias():
            yield "imported name", start, end


def _node_labels(pieces: Pieces, nodes: list[_Node]) -> list[_Found]:
    """Each token's innermost node: nodes are painted over those that contain them."""
    table = np.array(nodes)
    first, last = (np.searchsorted(pieces.anchor, table[:, column]) for column in (0, 1))
    innermost = np.full(len(pieces.anchor), -1)
    for number, (begin, end) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        innermost[begin:end] = number
    inside = np.flatnonzero(innermost >= 0)
    facts = table[innermost[inside]]
    found = [(inside, np.zeros(len(inside), np.int64))]
    for column in range(2, 6):
        known = facts[:, column] >= 0
        found.append((inside[known], facts[known, column]))
    for bit in range(len(_INSIDE)):
        holds = inside[facts[:, 6] >> bit & 1 == 1]
        found.append((holds, np.full(len(holds), _FIRST_INSIDE + bit)))
    return found


def _role_labels(pieces: Pieces, roles: list[_Role]) -> list[_Found]:
    """Tokens that hold a piece of a name, and the tokens right after such."""
    if not roles:
        return []
    ids = np.array([_ID[f"role: {role}"] for role, _, _ in roles])
    spans = np.array([(start, end) for _, start, end in roles])
    first = np.searchsorted(pieces.end, spans[:, 0], side="right")
    counts = np.maximum(np.searchsorted(pieces.start, spans[:, 1]) - first, 0)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    tokens, ids = np.repeat(first, counts) + within, np.repeat(ids, counts)
    followed = tokens + 1 < len(pieces.start)
    return [(tokens, ids), (tokens[followed] + 1, ids[followed] + _AFTER)]


# ---------------------------------------------------------------------------------------- lexemes


class _Lexemes:
    """What `tokenize` found: for each lexeme its span, ids that hold in it (-1: none), and the brackets open after it."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, int, int, int, int]] = []  # start, end, id, second id, depth id, bracket id
        self.roles: list[_Role] = []
        self.end = 0  # how many bytes of the source have been read
        self._open: list[str] = []

    def read(self, lines: _Lines, first: int) -> None:
        """Read from line `first` to the first error."""
        previous, string_starts = "", []
        source: Callable[[], str] = io.StringIO("".join(lines.text[first:])).readline
        try:
            for kind, text, (row, column), (end_row, end_column), _ in tokenize.generate_tokens(source):
                if not text.strip() or kind in (tokenize.ENCODING, tokenize.ENDMARKER):
                    continue
                name = tokenize.tok_name[kind]
                if name == "ERRORTOKEN":
                    return
                start, end = lines.byte(first + row - 1, column), lines.byte(first + end_row - 1, end_column)
                if name.endswith("STRING_START"):  # f-strings are lexemes of their own from Python 3.12 on
                    string_starts.append(start)
                elif name.endswith("STRING_END"):
                    start = string_starts.pop()
                    if not string_starts:
                        self._add(start, end, _ID["inside string"], _ID["inside f-string"])
                elif not string_starts:
                    self._classify(kind, text, previous, start, end)
                previous = text
            self.end = lines.byte(-1, len(lines.text[-1]))
        except (tokenize.TokenError, SyntaxError):
            return

    def _classify(self, kind: int, text: str, previous: str, start: int, end: int) -> None:
        if kind == tokenize.STRING:
            formatted = "f" in text[: text.index(text[-1])].lower()
            self._add(start, end, _ID["inside string"], _ID["inside f-string"] if formatted else -1)
        elif kind == tokenize.NAME and keyword.iskeyword(text):
            self._add(start, end, _ID["lexeme: keyword"], _ID[f"keyword: {text}"])
        elif kind == tokenize.NAME:
            self._add(start, end, _ID["lexeme: name"], -1)
            if previous in ("def", "class"):
                self.roles.append(("function name" if previous == "def" else "class name", start, end))
        else:
            if text in ("(", "[", "{"):
                self._open.append(text)
            elif text in (")", "]", "}") and self._open:
                self._open.pop()
            self._add(start, end, _LEXEME.get(kind, -1), _ID.get(f"operator: {text}", -1))

    def _add(self, start: int, end: int, kind: int, detail: int) -> None:
        depth = _ID["bracket depth 0"] + min(len(self._open), _MAX_BRACKETS)
        bracket = _ID[f"innermost bracket {self._open[-1]}"] if self._open else -1
        self.rows.append((start, end, kind, detail, depth, bracket))
        self.end = end


def _lexeme_labels(pieces: Pieces, lexemes: _Lexemes) -> list[_Found]:
    """Kinds go by the lexeme that holds the anchor; open brackets by what has been read when the token ends."""
    if not lexemes.rows:
        return []
    table = np.array(lexemes.rows)
    at_anchor = np.searchsorted(table[:, 0], pieces.anchor, side="right") - 1
    held = (at_anchor >= 0) & (pieces.anchor < table[at_anchor, 1])
    at_end = np.searchsorted(table[:, 0], pieces.end - 1, side="right") - 1
    read = (at_end >= 0) & (pieces.anchor < lexemes.end)
    found = []
    for column, place, valid in ((2, at_anchor, held), (3, at_anchor, held), (4, at_end, read), (5, at_end, read)):
        valid = valid & (table[place, column] >= 0)
        found.append((np.flatnonzero(valid), table[place[valid], column]))
    return found
