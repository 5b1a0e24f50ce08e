"""Labels of Python source: what a syntax tree says of the place of each token.

Nothing is executed. The tree is tree-sitter's, whose grammar of Python comes with a package and not with the interpreter, and
which goes on after errors: source that is cut off or broken keeps the labels of all that can be read.
Legend: n tokens of one document, k labels of them.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from saebench.labels.stretch import Block, Pieces, Stretch

_MAX_BRACKETS = 4  # depths from here on share a literal
_TREE_DEPTHS = (4, 7, 10)  # where the buckets of tree depth end

# Roles are of names, and of every token that holds a piece of the name.
_ROLES = (
    "function name", "class name", "parameter", "keyword argument", "attribute", "called name", "called method",
    "imported name", "assigned name",
)  # fmt: skip
_WHOLE = {  # what lies anywhere in such a node
    "lambda": "lambda",
    **dict.fromkeys(
        ("list_comprehension", "set_comprehension", "dictionary_comprehension", "generator_expression"), "comprehension"
    ),
    "type": "annotation", "else_clause": "else branch", "except_clause": "except clause", "finally_clause": "finally body",
}  # fmt: skip
_FIELD = {  # what lies in one field of such a node
    ("function_definition", "body"): "function body",
    ("class_definition", "body"): "class body",
    ("default_parameter", "value"): "default value", ("typed_default_parameter", "value"): "default value",
    ("if_statement", "condition"): "condition", ("elif_clause", "condition"): "condition",
    ("while_statement", "condition"): "condition",
    ("if_statement", "consequence"): "if body", ("elif_clause", "consequence"): "if body",
    ("for_statement", "body"): "loop body", ("while_statement", "body"): "loop body",
    ("with_statement", "body"): "with body", ("try_statement", "body"): "try body",
    ("subscript", "subscript"): "subscript",
}  # fmt: skip
_BETWEEN = {  # what lies between the brackets, or behind the sign, of such a node in such a field
    ("class_definition", "superclasses"): "bases of a class",
    ("call", "arguments"): "call arguments",
    ("decorated_definition", None): "decorator",
}
_INSIDE = tuple(dict.fromkeys([*_WHOLE.values(), *_FIELD.values(), *_BETWEEN.values(), "docstring"]))
_BITS = {name: 1 << bit for bit, name in enumerate(_INSIDE)}

_KINDS_TEXT = """
aliased_import argument_list as_pattern as_pattern_target assert_statement assignment attribute augmented_assignment
await binary_operator block boolean_operator break_statement call case_clause case_pattern chevron class_definition
class_pattern comment comparison_operator complex_pattern concatenated_string conditional_expression constrained_type
continue_statement decorated_definition decorator default_parameter delete_statement dict_pattern dictionary
dictionary_comprehension dictionary_splat dictionary_splat_pattern dotted_name elif_clause ellipsis else_clause
escape_interpolation escape_sequence except_clause exec_statement expression_list expression_statement false
finally_clause float for_in_clause for_statement format_expression format_specifier function_definition
future_import_statement generator_expression generic_type global_statement identifier if_clause if_statement
import_from_statement import_prefix import_statement integer interpolation keyword_argument keyword_pattern
keyword_separator lambda lambda_parameters line_continuation list list_comprehension list_pattern list_splat
list_splat_pattern match_statement member_type module named_expression none nonlocal_statement not_operator pair
parameters parenthesized_expression parenthesized_list_splat pass_statement pattern_list positional_separator
print_statement raise_statement relative_import return_statement set set_comprehension slice splat_pattern splat_type
string string_content string_end string_start subscript true try_statement tuple tuple_pattern type
type_alias_statement type_conversion type_parameter typed_default_parameter typed_parameter unary_operator
union_pattern union_type while_statement wildcard_import with_clause with_item with_statement yield
"""
_KINDS = tuple(_KINDS_TEXT.split())
_STATEMENTS = tuple(
    kind
    for kind in _KINDS
    if kind.endswith(("_statement", "_definition")) or kind in ("assignment", "augmented_assignment")
)
_KEYWORDS_TEXT = """
False None True and as assert async await break case class continue def del elif else except exec finally for from
global if import in is lambda match nonlocal not or pass print raise return try type while with yield
"""
_KEYWORDS = tuple(_KEYWORDS_TEXT.split())
_OPERATORS_TEXT = """
!= % %= & &= ( ) * ** **= *= + += , - -= -> . ... / // //= /= : := ; < << <<= <= = == > >= >> >>= @ @= [ ] ^ ^= { | |= }
~
"""
_OPERATORS = tuple(_OPERATORS_TEXT.split())

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
    *(f"keyword: {word}" for word in _KEYWORDS),
    *(f"operator: {symbol}" for symbol in _OPERATORS),
    *(f"bracket depth {depth}" for depth in range(_MAX_BRACKETS)), f"bracket depth >= {_MAX_BRACKETS}",
    *(f"innermost bracket {bracket}" for bracket in "([{"),
)  # fmt: skip
_ID = {name: number for number, name in enumerate(NAMES)}
_NODE, _PARENT = ({kind: _ID[f"{what}: {kind}"] for kind in _KINDS} for what in ("node", "parent"))
_STATEMENT = {kind: _ID[f"statement: {kind}"] for kind in _STATEMENTS}
_DEPTH, _FIRST_INSIDE, _AFTER = _ID["tree depth < 4"], _ID[f"inside {_INSIDE[0]}"], len(_ROLES)
_OPENS, _CLOSES = ("(", "[", "{"), (")", "]", "}")

# Where a name stands: (kind of the node around it, field) -> its role.
_ROLE_AT = {
    ("function_definition", "name"): "function name", ("class_definition", "name"): "class name",
    ("attribute", "attribute"): "attribute", ("call", "function"): "called name",
    ("keyword_argument", "name"): "keyword argument",
    ("parameters", None): "parameter", ("lambda_parameters", None): "parameter", ("typed_parameter", None): "parameter",
    ("default_parameter", "name"): "parameter", ("typed_default_parameter", "name"): "parameter",
    ("named_expression", "name"): "assigned name",
}  # fmt: skip
_TARGETS = {
    ("assignment", "left"), ("augmented_assignment", "left"), ("for_statement", "left"), ("for_in_clause", "left"),
    ("as_pattern", "alias"),
}  # fmt: skip
_TARGET_PARTS = ("pattern_list", "tuple_pattern", "list_pattern", "list_splat_pattern", "as_pattern_target")
_SPLATS = ("list_splat_pattern", "dictionary_splat_pattern")

_Found = tuple[np.ndarray, np.ndarray]  # token numbers, ids


def label(stretch: Stretch) -> Iterator[Block]:
    """Literals of syntax, of the documents that are Python."""
    for passage in stretch.passages:
        wanted = passage.places >= 0
        tokens, codes = label_source(passage.pieces, passage.name.endswith(".py"), wanted)
        yield Block(NAMES, codes, passage.places[tokens])


def label_source(
    pieces: Pieces, named_python: bool, wanted: Bool[np.ndarray, " n"] | None = None
) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"]]:
    """(token numbers, indices into `NAMES`) of the labels that hold on wanted tokens; none where the source is not Python.

    A document whose name does not say that it is Python is, when all of it parses and some statement of
    it is more than an expression (as every single word of prose is). By default all tokens are wanted; where they are few, little
    more of the tree is walked than what they lie in.
    """
    found: list[_Found] = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    root = parse(pieces.source)
    if not named_python and (root.has_error or not _is_program(root)):
        return found[0]
    if wanted is None:
        wanted = np.ones(len(pieces.start), bool)
    # A token has labels of the one before it, too.
    seen = _Seen(np.append(pieces.start[:1], pieces.start[:-1])[wanted], pieces.end[wanted])
    seen.walk(root)
    found += _node_labels(pieces, seen.nodes)
    found += _lexeme_labels(pieces, seen)
    found += _role_labels(pieces, seen.roles)
    tokens, ids = (np.concatenate(part) for part in zip(*found, strict=True))
    held = wanted[tokens]
    return tokens[held], ids[held]


@cache
def _parser() -> Any:
    import tree_sitter
    import tree_sitter_python

    return tree_sitter.Parser(tree_sitter.Language(tree_sitter_python.language()))


def parse(source: bytes) -> Any:
    """The root of the syntax tree of Python source; bytes count as they do in the source.

    Source that was cut at its start may begin within a string: where it has errors, it is also read from its first line that
    looks like one of a module, and the tree with less of it in errors is taken.
    """
    if source.startswith(b"\xef\xbb\xbf"):
        source = b"\f\f\f" + source[3:]  # which indents nothing
    source = re.sub(rb"\r(?!\n)", b"\n", source).replace(b"\0", b" ")
    root = _parser().parse(source).root_node
    head = _HEAD.search(source, 1) if root.has_error else None
    if head is None:
        return root
    rest = _parser().parse(b"\n" * head.start() + source[head.start() :]).root_node
    return rest if head.start() + _in_errors(rest) < _in_errors(root) else root


_HEAD = re.compile(rb"^(?:def|class|import|from|if|for|while|with|try|async|@|[A-Za-z_]\w* *=)", re.MULTILINE)


def share_in_errors(source: bytes) -> float:
    """Share of some text that lies in syntax errors, were it Python; 0 where there is none."""
    return _in_errors(parse(source)) / max(len(source), 1)


def _in_errors(root: Any) -> int:
    """Bytes that are in errors."""
    total, stack = 0, [root]
    while stack:
        node = stack.pop()
        if node.type == "ERROR":
            total += node.end_byte - node.start_byte
        elif node.has_error:
            stack += node.children
    return total


def _is_program(root: Any) -> bool:
    """Whether some statement is more than an expression."""
    for node in root.named_children:
        if node.type == "expression_statement":
            if any(child.type in ("assignment", "augmented_assignment") for child in node.named_children):
                return True
        elif node.type != "comment":
            return True
    return False


# ------------------------------------------------------------------------------------------- tree


class _Place(NamedTuple):
    """What the nodes around a node say of it."""

    parent: str = ""
    field: str | None = None
    statement: int = -1
    depth: int = 0
    bits: int = 0
    called: bool = False  # the function of a call
    target: bool = False  # assigned to
    whole: bool = True  # in no error
    string: bool = False


class _Seen:
    """What a walk over a tree finds: nodes with their facts, roles of names, and lexemes with the brackets open after them.

    Nodes that reach into none of the spans from `start` to `end`, both ascending, are passed over. So that the brackets are counted none
    the less, one with errors is not: in any other each bracket that opens is closed.
    """

    def __init__(self, start: Int[np.ndarray, " s"], end: Int[np.ndarray, " s"]) -> None:
        self._start, self._end = start.tolist(), end.tolist()
        self.nodes: list[tuple[int, int, int, int, int, int, int, int]] = []
        """start, end, ids of kind, parent, statement and depth, bits, whether parsed; parents before children"""
        self.roles: list[tuple[str, int, int]] = []
        self.lexemes: list[tuple[int, int, int, int, int, int]] = []
        """start, end, id, second id (-1: none), depth id, bracket id"""
        self._open: list[str] = []

    def walk(self, root: Any) -> None:
        stack: list[tuple[Any, _Place | None]] = [(root, _Place())]
        while stack:
            node, place = stack.pop()
            if place is None:
                self._read(node)
                continue
            kind = node.type
            if not node.child_count or kind == "string":
                self._lexeme(node, kind, place)
            if not node.is_named:
                continue
            statement = _STATEMENT.get(kind, place.statement)
            bits = place.bits | _BITS.get(_WHOLE.get(kind, ""), 0)
            whole = place.whole and kind != "ERROR"
            depth = _DEPTH + sum(place.depth >= limit for limit in _TREE_DEPTHS)
            ids = (_NODE.get(kind, -1), _PARENT.get(place.parent, -1), statement, depth)
            self.nodes.append((node.start_byte, node.end_byte, *ids, bits, whole))
            self._role(node, kind, place)
            doc = _docstring(node) if kind in ("module", "block") else None
            between = _BITS.get(_BETWEEN.get((place.parent, place.field), ""), 0) if kind in _BRACKETED else 0
            inner = _Place(
                kind,
                None,
                statement,
                place.depth + 1,
                bits | between,
                False,
                False,
                whole,
                place.string or kind == "string",
            )
            children = node.children
            for number in range(len(children) - 1, -1, -1):
                child = children[number]
                if not child.is_named:  # a sign or a word is a lexeme, and says nothing of its own
                    stack.append((child, inner))
                    continue
                if not self._wanted(child):
                    if not inner.string and child.start_byte < child.end_byte:
                        stack.append((child, None))
                    continue
                field = node.field_name_for_child(number)
                stack.append((child, inner._replace(
                    field=field,
                    bits=inner.bits | _BITS.get(_FIELD.get((kind, field), ""), 0) | (_BITS["docstring"] if child == doc else 0),
                    called=field == "function" and kind == "call",
                    target=(kind, field) in _TARGETS or (place.target and kind in _TARGET_PARTS),
                )))  # fmt: skip

    def _wanted(self, node: Any) -> bool:
        last = bisect_left(self._start, node.end_byte) - 1
        return (last >= 0 and self._end[last] > node.start_byte) or node.has_error

    def _role(self, node: Any, kind: str, place: _Place) -> None:
        start, end = node.start_byte, node.end_byte
        if kind == "identifier":
            role = _ROLE_AT.get((place.parent, place.field))
            if role is None and (place.target or place.parent == "as_pattern_target"):
                role = "assigned name"
            if role is not None:
                self.roles.append((role, start, end))
        elif kind == "attribute" and place.called:
            name = node.child_by_field_name("attribute")
            if name is not None:
                self.roles.append(("called method", name.start_byte, name.end_byte))
        elif kind in _SPLATS and place.parent in ("parameters", "lambda_parameters", "typed_parameter"):
            for name in node.named_children:
                self.roles.append(("parameter", name.start_byte, name.end_byte))
        elif place.field == "name" and place.parent in ("import_statement", "import_from_statement"):
            self.roles.append(("imported name", start, end))

    def _lexeme(self, node: Any, kind: str, place: _Place) -> None:
        if place.string:
            return
        first, second = -1, -1
        if kind == "string":
            first = _ID["inside string"]
            opening = node.children[0].text if node.child_count else b""
            second = _ID["inside f-string"] if b"f" in opening.lower() else -1
        elif kind == "comment":
            first = _ID["inside comment"]
        elif kind in ("integer", "float"):
            first = _ID["lexeme: number"]
        elif kind == "identifier":
            first = _ID["lexeme: name"]
        elif f"keyword: {(word := _WORDS.get(kind, kind))}" in _ID:
            first, second = _ID["lexeme: keyword"], _ID[f"keyword: {word}"]
        elif f"operator: {(sign := _WORDS.get(kind, kind))}" in _ID:
            first, second = _ID["lexeme: operator"], _ID[f"operator: {sign}"]
            if sign in _OPENS:
                self._open.append(sign)
            elif sign in _CLOSES and self._open:
                self._open.pop()
        elif node.start_byte == node.end_byte:
            return
        self._read(node, first, second)

    def _read(self, node: Any, first: int = -1, second: int = -1) -> None:
        """Take down a lexeme, or all that lies in a node that was passed over, with the brackets open after it."""
        depth = _ID["bracket depth 0"] + min(len(self._open), _MAX_BRACKETS)
        bracket = _ID[f"innermost bracket {self._open[-1]}"] if self._open else -1
        self.lexemes.append((node.start_byte, node.end_byte, first, second, depth, bracket))


_BRACKETED = ("argument_list", "decorator")
_WORDS = {"true": "True", "false": "False", "none": "None", "ellipsis": "..."}


def _docstring(body: Any) -> Any:
    """The statement that is the docstring of a module, or of the function or class whose block this is; None where there is none."""
    owner = body.parent
    if owner is not None and owner.type not in ("function_definition", "class_definition"):
        return None
    first = next((node for node in body.named_children if node.type != "comment"), None)
    if first is None or first.type != "expression_statement":
        return None
    return first if [child.type for child in first.named_children] in (["string"], ["concatenated_string"]) else None


def _node_labels(pieces: Pieces, nodes: list[tuple[int, ...]]) -> list[_Found]:
    """Each token's innermost node: nodes are painted over those that contain them."""
    table = np.array(nodes)
    first, last = (np.searchsorted(pieces.anchor, table[:, column]) for column in (0, 1))
    innermost = np.full(len(pieces.anchor), -1)
    for number, (begin, end) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        innermost[begin:end] = number
    inside = np.flatnonzero(innermost >= 0)
    facts = table[innermost[inside]]
    parsed = inside[facts[:, 7] == 1]
    found = [(parsed, np.zeros(len(parsed), np.int64))]
    for column in range(2, 6):
        known = facts[:, column] >= 0
        found.append((inside[known], facts[known, column]))
    for bit in range(len(_INSIDE)):
        holds = inside[facts[:, 6] >> bit & 1 == 1]
        found.append((holds, np.full(len(holds), _FIRST_INSIDE + bit)))
    return found


def _role_labels(pieces: Pieces, roles: list[tuple[str, int, int]]) -> list[_Found]:
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


def _lexeme_labels(pieces: Pieces, seen: _Seen) -> list[_Found]:
    """Kinds go by the lexeme that holds the anchor; open brackets by what has been read when the token ends."""
    if not seen.lexemes:
        return []
    table = np.array(seen.lexemes)
    at_anchor = np.searchsorted(table[:, 0], pieces.anchor, side="right") - 1
    held = (at_anchor >= 0) & (pieces.anchor < table[at_anchor, 1])
    at_end = np.searchsorted(table[:, 0], pieces.end - 1, side="right") - 1
    read = at_end >= 0
    found = []
    for column, place, valid in ((2, at_anchor, held), (3, at_anchor, held), (4, at_end, read), (5, at_end, read)):
        valid = valid & (table[place, column] >= 0)
        found.append((np.flatnonzero(valid), table[place[valid], column]))
    return found
