"""How row expressions and their statistics are written for people."""

from __future__ import annotations

from typing import Any

import sympy
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter

from .symbols import STATISTICS, SUM, dot, entry, lse_of, mean_p_of, mean_pz_of, pick


class _Printer(StrPrinter):
    def _print_Float(self, value: sympy.Float) -> str:
        return repr(float(value))

    def _print_AppliedUndef(self, value: Any) -> str:
        if value.func == entry:
            q, y = value.args
            return f"{q}[{y}]"
        return super()._print_Function(value)

    def _print_Add(self, expr: sympy.Add, order: Any = None) -> str:
        """Positive terms first, and lse before picked logits before their sum."""
        terms = sorted(
            expr.args, key=lambda t: (t.could_extract_minus_sign(), t.has(SUM), t.has(pick), _by_name(t))
        )
        parts = [self._print(terms[0])]
        for term in terms[1:]:
            minus = term.could_extract_minus_sign()
            parts.append(
                f" {'-' if minus else '+'} {self.parenthesize(-term if minus else term, PRECEDENCE['Add'])}"
            )
        return "".join(parts)


def _by_name(value: sympy.Expr) -> str:
    """As text in the order of labels, of which y2 is before y10, however often their logits are counted."""
    count, term = value.as_coeff_Mul()
    numbered = [y for y in value.free_symbols if y.name[1:].isdigit()]
    names = {y: sympy.Symbol(y.name[0] + y.name[1:].zfill(4)) for y in numbered}
    return str((term if term.func == pick and count.is_Integer else value).xreplace(names))


def _decimal(value: sympy.Rational) -> sympy.Expr:
    nearest = float(value)
    return sympy.Integer(int(nearest)) if nearest.is_integer() else sympy.Float(value)


def render(value: sympy.Expr) -> str:
    """The normal form as text, for example `lse - 0.9*pick(y) - 0.1*sum/V`."""
    decimal = value.replace(lambda e: e.is_Rational and not e.is_Integer, _decimal)
    return _Printer().doprint(decimal)


def statistics_of(value: sympy.Expr) -> list[str]:
    """The names of the statistics in a row expression, in the order of the table above."""
    names = [s.symbol.name for s in STATISTICS if value.has(s.symbol)]
    functions = sorted(value.atoms(pick, dot, mean_p_of, mean_pz_of, lse_of), key=_by_name)
    return list(dict.fromkeys(names)) + [render(f) for f in functions]
