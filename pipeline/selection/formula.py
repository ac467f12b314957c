"""Formulas over score columns: what may be written in `select.by` and `select.where`, and what it evaluates to.

The grammar is a small part of Python's expressions, checked node by node: numbers, column names (`utility`, or
`other.utility` for a joined run), `+ - * /`, comparisons, `and or not`, and the functions `rank`, `abs`, `log`, `min`
and `max`; columns of text are compared with texts, `source == "a.org"` or `source in ("a.org", "b.org")`. Nothing else
is looked up or called.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ConfigError
from pipeline.selection.parsing import parse
from pipeline.selection.ranks import RankTable

Array = npt.NDArray[Any]

_MAX_LENGTH = 2000
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: np.add, ast.Sub: np.subtract, ast.Mult: np.multiply, ast.Div: np.divide,
    ast.Lt: np.less, ast.LtE: np.less_equal, ast.Gt: np.greater, ast.GtE: np.greater_equal,
    ast.Eq: np.equal, ast.NotEq: np.not_equal,
}  # fmt: skip
_FUNCTIONS = {"rank": (1, 1), "abs": (1, 1), "log": (1, 1), "min": (2, 99), "max": (2, 99)}
_LOGICAL = (ast.Compare, ast.BoolOp)


@dataclass(frozen=True)
class Formula:
    """A checked formula.

    Attributes:
        source: its text.
        key: where it stands in the config.
        columns: the columns of numbers that it reads.
        texts: the columns of text that it reads.
        ranked: the arguments of its `rank(...)`.
        logical: whether it is a condition.
    """

    source: str
    key: str
    columns: frozenset[str]
    texts: frozenset[str]
    ranked: tuple[str, ...]
    logical: bool

    @property
    def column(self) -> str | None:
        """The name of the column, when the formula is nothing but a column."""
        return self.source if self.columns == {self.source} else None

    def evaluate(self, columns: Mapping[str, Array | pa.Array], tables: Mapping[str, RankTable]) -> Array:
        """Value per row: float64, or bool for a condition; `columns` are [n] each, `tables` one per `ranked`.

        Columns of text are Arrow's. Division by zero and logarithms of what is not positive give values that are not
        finite.
        """
        with np.errstate(all="ignore"):
            return np.asarray(_evaluate(_tree(self.source, self.key), columns, tables))


def parse_formula(
    source: str, key: str, known: Collection[str], texts: Collection[str] = (), *, condition: bool = False
) -> Formula:
    """Check `source` (config key `key`) against the grammar and the columns of numbers and of text that there are.

    Raises `ConfigError`.
    """
    tree = _tree(source, key)
    _check(tree, source, key)
    columns, of_text = frozenset(_columns(tree)), frozenset(_texts(tree))
    for names, there in ((columns, known), (of_text, texts)):
        for name in sorted(names - set(there)):
            close = difflib.get_close_matches(name, list(there), n=1)
            hint = f"did you mean {close[0]!r}?" if close else ", ".join(sorted(there))
            raise ConfigError(f"expected known columns ({hint})", key=key, found=name)
    logical = _is_logical(tree)
    if condition and not logical:
        raise ConfigError("expected a condition such as 'width >= 64'", key=key, found=source)
    ranked = []
    for node in ast.walk(tree):
        if _is_rank(node):
            ranked.append(ast.unparse(node.args[0]))  # type: ignore[attr-defined]
            if any(_is_rank(inner) for inner in ast.walk(node.args[0])):  # type: ignore[attr-defined]
                raise ConfigError("expected no rank() within rank()", key=key, found=source)
    return Formula(ast.unparse(tree), key, columns, of_text, tuple(dict.fromkeys(ranked)), logical)


def _tree(source: str, key: str) -> ast.expr:
    if len(source) > _MAX_LENGTH:
        raise ConfigError(f"expected a formula of at most {_MAX_LENGTH} characters", key=key)
    try:
        return parse(source.strip())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ConfigError("expected a formula over score columns", key=key, found=source) from None


def _check(node: ast.expr, source: str, key: str) -> None:
    def refuse(expected: str) -> ConfigError:
        return ConfigError(expected, key=key, found=source)

    match node:
        case ast.Constant(value=value):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise refuse("expected numbers, or text beside a column of text: source == 'a.org'")
        case ast.Name() | ast.Attribute(value=ast.Name()):
            pass
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _OPERATORS:
            _check(left, source, key)
            _check(right, source, key)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() | ast.Not(), operand=operand):
            _check(operand, source, key)
        case ast.Compare() if _choices(node) is not None:
            pass
        case ast.Compare(left=left, ops=operators, comparators=others) if all(type(o) in _OPERATORS for o in operators):
            for part in (left, *others):
                _check(part, source, key)
        case ast.BoolOp(values=values):
            for part in values:
                _check(part, source, key)
                if not _is_logical(part):
                    raise refuse("expected conditions on both sides of 'and' and 'or'")
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            fewest, most = _FUNCTIONS[name]
            if not fewest <= len(arguments) <= most:
                raise refuse(f"expected {name}() with {'one argument' if most == 1 else 'two arguments or more'}")
            for part in arguments:
                _check(part, source, key)
        case _:
            raise refuse("expected + - * /, comparisons, and/or/not, rank, abs, log, min, max, numbers and columns")


def _choices(node: ast.expr) -> list[str] | None:
    """The texts that a column of text is compared with; None for any other node."""
    match node:
        case ast.Compare(left=ast.Name(), ops=[ast.Eq() | ast.NotEq()], comparators=[ast.Constant(value=str(text))]):
            return [text]
        case ast.Compare(
            left=ast.Name(), ops=[ast.In() | ast.NotIn()], comparators=[ast.Tuple(elts=parts) | ast.List(elts=parts)]
        ):
            texts = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            return texts if texts and len(texts) == len(parts) else None
    return None


def _texts(node: ast.expr) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Compare) and _choices(part) is not None:
            yield part.left.id  # type: ignore[attr-defined]


def _is_logical(node: ast.AST) -> bool:
    return isinstance(node, _LOGICAL) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not))


def _is_rank(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "rank"


def _columns(node: ast.expr) -> Iterator[str]:
    match node:
        case ast.Compare() if _choices(node) is not None:
            pass
        case ast.Name(id=name):
            yield name
        case ast.Attribute(value=ast.Name(id=run), attr=name):
            yield f"{run}.{name}"
        case ast.Call(args=arguments):
            for part in arguments:
                yield from _columns(part)
        case _:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    yield from _columns(child)


def _evaluate(node: ast.expr, columns: Mapping[str, Array | pa.Array], tables: Mapping[str, RankTable]) -> Any:
    def value(part: ast.expr) -> Any:
        return _evaluate(part, columns, tables)

    match node:
        case ast.Constant(value=number):
            return np.float64(number)  # type: ignore[arg-type]
        case ast.Name(id=name):
            return columns[name]
        case ast.Attribute(value=ast.Name(id=run), attr=name):
            return columns[f"{run}.{name}"]
        case ast.BinOp(left=left, op=operator, right=right):
            return _OPERATORS[type(operator)](value(left), value(right))
        case ast.UnaryOp(op=operator, operand=operand):
            inner = value(operand)
            if isinstance(operator, ast.Not):
                return np.logical_not(inner)
            return np.negative(inner) if isinstance(operator, ast.USub) else inner
        case ast.Compare(left=ast.Name(id=name), ops=[operator]) if (texts := _choices(node)) is not None:
            column = columns[name]
            found = pc.is_in(column, value_set=pa.array(texts, pa.string())).to_numpy(zero_copy_only=False)
            return found if isinstance(operator, ast.Eq | ast.In) else ~found
        case ast.Compare(left=left, ops=operators, comparators=others):
            sides = [value(part) for part in (left, *others)]
            found = [_OPERATORS[type(o)](a, b) for o, a, b in zip(operators, sides, sides[1:], strict=False)]
            return reduce(np.logical_and, found)
        case ast.BoolOp(op=operator, values=values):
            joined = np.logical_and if isinstance(operator, ast.And) else np.logical_or
            return reduce(joined, [value(part) for part in values])
        case ast.Call(func=ast.Name(id="rank"), args=[argument]):
            return tables[ast.unparse(argument)].rank(np.asarray(value(argument), dtype=np.float32))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            parts = [value(part) for part in arguments]
            if name in ("min", "max"):
                return reduce(np.minimum if name == "min" else np.maximum, parts)
            return np.abs(parts[0]) if name == "abs" else np.log(parts[0])
    raise AssertionError(ast.dump(node))
