"""Numbers of one's own: formulas over the metrics of a record, each with the direction in which it is better.

They are worked out when records are read and stand in none: a formula may be changed, or thought of, after the runs.
"""

import ast
import operator
from typing import NamedTuple

import numpy as np
import pandas as pd

from lib.errors import UsageError
from lib.record.names import check_name, printable
from lib.record.schema import Metrics

DIRECTIONS = ("lower", "higher")
MOST = 20  # of them
LONGEST = 300  # characters of a formula
OPERATIONS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Pow: operator.pow, ast.USub: operator.neg,
}  # fmt: skip
EXAMPLE = '{"tokens/s per GiB": {formula: non_padding_tokens_per_s / (peak_memory_bytes / 2**30), better: higher}}'


class OwnMetric(NamedTuple):
    """A number of a run by a formula. `needs`: the metrics of the record that it is made of."""

    name: str
    formula: str
    better: str  # of DIRECTIONS
    needs: tuple[str, ...]

    @property
    def column(self) -> str:
        """What it is called beside the columns of `lib.record.read`: no metric of a record is called so."""
        return f"own: {self.name}"

    def of(self, runs: pd.DataFrame) -> pd.Series:
        """Its value of each run; NaN where a metric of it is missing, or where it is no finite number."""
        given = {name: runs[name].astype(float) for name in self.needs}
        with np.errstate(all="ignore"):
            found = _value(ast.parse(self.formula, mode="eval").body, given)
        return pd.Series(found, runs.index, dtype=float).replace([np.inf, -np.inf], np.nan)


def own_metrics(given: dict) -> list[OwnMetric]:
    """The metrics that a profile or summary.ipynb asks for: name to `formula` and `better`, as in `EXAMPLE`.

    A formula has numbers, names of `Metrics`, + - * / ** and parentheses. Raises UsageError for anything else.
    """
    if not isinstance(given, dict) or len(given) > MOST:
        raise UsageError(f"own_metrics must be at most {MOST} of them, by name, such as {EXAMPLE}")
    return [_own(name, said) for name, said in given.items()]


def _own(name, said) -> OwnMetric:
    try:
        check_name(name, "name")
    except (TypeError, AttributeError, ValueError):
        raise UsageError(
            f"own_metrics: {printable(repr(name), 60)} cannot be shown as a name; choose another"
        ) from None
    if not isinstance(said, dict) or set(said) != {"formula", "better"}:
        raise UsageError(f"own_metrics: {name} must have `formula` and `better`, no more and no less: {EXAMPLE}")
    if said["better"] not in DIRECTIONS:
        shown = printable(repr(said["better"]), 60)
        raise UsageError(f"own_metrics: better of {name} must be {' or '.join(DIRECTIONS)}, not {shown}")
    formula = said["formula"]
    if not isinstance(formula, str) or len(formula) > LONGEST:
        raise UsageError(f"own_metrics: the formula of {name} must be a text of at most {LONGEST} characters")
    try:
        body = ast.parse(formula, mode="eval").body
        needs = tuple(sorted({node.id for node in ast.walk(body) if isinstance(node, ast.Name)}))
        unknown = [printable(needed, 60) for needed in needs if needed not in Metrics.model_fields]
        if not unknown:
            tried = _value(body, {needed: 2.3 + 1.7 * place for place, needed in enumerate(needs)})
            if isinstance(tried, complex):
                raise ValueError("a root of what is below 0")
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        said = "numbers, names of a record's metrics, + - * / ** and parentheses"
        raise UsageError(
            f"own_metrics: the formula of {name} must be made of {said}: {printable(formula, 80)}"
        ) from None
    except ArithmeticError as error:
        raise UsageError(f"own_metrics: the formula of {name} cannot be worked out: {error}") from None
    if unknown or not needs:
        odd = f"there is no metric {unknown[0]}" if unknown else "it has no metric of a record"
        raise UsageError(f"own_metrics: the formula of {name}: {odd}; known: {', '.join(Metrics.model_fields)}")
    return OwnMetric(name, formula, said["better"], needs)


def _value(node: ast.expr, given: dict):
    """A formula's value. Raises ValueError for what is none of `OPERATIONS`."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(node.value)
    if isinstance(node, ast.Name):
        return given[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.left, given), _value(node.right, given))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.operand, given))
    raise ValueError(type(node).__name__)
