"""What was swapped, what was not, and why."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter, defaultdict
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class Row:
    """One place in the model that a rule looked at.

    `max_error` is the largest error of the swap against the module it replaces, in fp32, over
    outputs and gradients, relative to the largest value; None where nothing had to be compared.
    `eligible` is False for what the rule does not apply to, or was switched off for.
    """

    site: str
    rule: str
    swapped: bool
    reason: str
    max_error: float | None = None
    eligible: bool = True


class Coverage(NamedTuple):
    swapped: int
    eligible: int


@dataclasses.dataclass(frozen=True)
class InjectionReport:
    """The rows of one injection; `print(report)` is a table."""

    rows: tuple[Row, ...]

    @property
    def coverage(self) -> dict[str, Coverage]:
        """For each rule, how many of the eligible sites were swapped."""
        swapped, eligible = Counter(), Counter()
        for row in self.rows:
            eligible[row.rule] += row.eligible
            swapped[row.rule] += row.swapped
        return {rule: Coverage(swapped[rule], eligible[rule]) for rule in eligible}

    @property
    def refused(self) -> tuple[Row, ...]:
        """Eligible sites that were not swapped."""
        return tuple(row for row in self.rows if row.eligible and not row.swapped)

    def to_json(self) -> str:
        coverage = {rule: c._asdict() for rule, c in self.coverage.items()}
        rows = [dataclasses.asdict(row) for row in self.rows]
        return json.dumps({"coverage": coverage, "rows": rows}, indent=2)

    def table(self) -> list[list[str]]:
        """Cells, header first; sites that differ only in layer numbers share a line."""
        groups = defaultdict(list)
        for row in self.rows:
            pattern = re.sub(r"\d+", "*", row.site)
            groups[(row.rule, pattern, row.swapped, row.reason)].append(row)
        lines = [["rule", "site", "count", "swapped", "max error", "reason"]]
        for (rule, pattern, swapped, reason), rows in groups.items():
            errors = [row.max_error for row in rows if row.max_error is not None]
            error = f"{max(errors):.1e}" if errors else ""
            site = rows[0].site if len(rows) == 1 else pattern
            lines.append([rule, site, str(len(rows)), "yes" if swapped else "no", error, reason])
        return lines

    def __str__(self) -> str:
        lines = self.table()
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        text = [
            "  ".join(c.ljust(w) for c, w in zip(ln, widths, strict=True)).rstrip() for ln in lines
        ]
        text.insert(1, "  ".join("-" * w for w in widths))
        covered = [f"{rule} {c.swapped}/{c.eligible}" for rule, c in self.coverage.items()]
        return "\n".join([*text, "coverage: " + (", ".join(covered) or "nothing to swap")])
