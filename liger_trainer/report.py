"""What was swapped, what was not, and why; kept up to date while the model runs."""

from __future__ import annotations

import dataclasses
import enum
import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import NamedTuple

logger = logging.getLogger(__name__)


class Status(enum.Enum):
    """The outcome for one site that a rule examined."""

    SWAPPED = "swapped"
    REFUSED = "refused"  # the rule applies, but the site runs as in the plain model
    NOT_APPLICABLE = "not applicable"  # the rule's kernel is not for this site
    OFF = "off"  # switched off by liger_kernel_config or an option of the trainer


_SWAPPED = {
    Status.SWAPPED: "yes",
    Status.REFUSED: "no",
    Status.NOT_APPLICABLE: "n/a",
    Status.OFF: "off",
}  # in the table


@dataclasses.dataclass(frozen=True)
class Row:
    """One site in the model that a rule examined.

    `max_error` is the largest difference between the kernel and the module that it replaces, both
    in fp32, over outputs and gradients, relative to the largest value; None if they were not
    compared in fp32. Whether the site is swapped may depend on other dtypes, too.
    """

    site: str
    rule: str
    status: Status
    reason: str
    max_error: float | None = None

    @property
    def swapped(self) -> bool:
        return self.status is Status.SWAPPED

    @property
    def answer(self) -> str:
        """Whether the site was swapped, for people: "yes", "no", "n/a" or "off"."""
        return _SWAPPED[self.status]

    @property
    def eligible(self) -> bool:
        """Whether a rule applies here: the site was swapped or refused."""
        return self.status in (Status.SWAPPED, Status.REFUSED)

    def to_dict(self) -> dict[str, object]:
        """Return the fields as plain values, with `swapped` and `eligible`."""
        derived = {"swapped": self.swapped, "eligible": self.eligible}
        return {**dataclasses.asdict(self), "status": self.status.value, **derived}


class Coverage(NamedTuple):
    """Numbers of sites of one rule."""

    swapped: int
    eligible: int


@dataclasses.dataclass(repr=False)
class InjectionReport:
    """The rows of one injection; `print(report)` prints a table.

    If a site does not run fused after all, because of how the model is used or was changed later,
    its row is amended, with one warning per reason.
    """

    rows: tuple[Row, ...]
    warned: set[tuple[str, str]] = dataclasses.field(default_factory=set, compare=False)

    def amend(self, *rows: Row) -> None:
        """Replace the rows of the same site and rule, or add new ones, and warn about refusals."""
        new = {(row.site, row.rule): row for row in rows}
        amended = [new.pop((row.site, row.rule), row) for row in self.rows]
        self.rows = (*amended, *new.values())
        sites = defaultdict(list)
        for row in rows:
            if row.status is Status.REFUSED and (row.rule, row.reason) not in self.warned:
                sites[row.rule, row.reason].append(row.site)
        for (rule, reason), found in sites.items():
            self.warned.add((rule, reason))
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            logger.warning("%s: %s%s runs as in the plain model: %s", rule, found[0], more, reason)

    def remove(self, is_gone: Callable[[Row], bool]) -> None:
        """Leave out rows whose places the model no longer has."""
        self.rows = tuple(row for row in self.rows if not is_gone(row))

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
        return tuple(row for row in self.rows if row.status is Status.REFUSED)

    def to_json(self) -> str:
        coverage = {rule: c._asdict() for rule, c in self.coverage.items()}
        rows = [row.to_dict() for row in self.rows]
        return json.dumps({"coverage": coverage, "rows": rows}, indent=2)

    def __repr__(self) -> str:
        return str(self)

    def table(self) -> list[list[str]]:
        """Return lines of cells, header first; sites that differ only in numbers share a line."""
        groups = defaultdict(list)
        for row in self.rows:
            pattern = re.sub(r"\d+", "*", row.site)
            groups[(row.rule, pattern, row.status, row.reason)].append(row)
        lines = [["rule", "site", "count", "swapped", "max error", "reason"]]
        for (rule, pattern, _, reason), rows in groups.items():
            errors = [row.max_error for row in rows if row.max_error is not None]
            error = f"{max(errors):.1e}" if errors else ""
            site = rows[0].site if len(rows) == 1 else pattern
            lines.append([rule, site, str(len(rows)), rows[0].answer, error, reason])
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


@dataclasses.dataclass(eq=False)
class Site:
    """The row of a swapped module, through which it reports how it runs."""

    report: InjectionReport
    row: Row
    reason: str | None = None  # why it currently runs as in the plain model

    def runs(self, reason: str | None, status: Status = Status.REFUSED) -> None:
        """Record that the module runs as in the plain model for `reason`, or fused if None.

        `status` tells whether the rule applies to it all the same.
        """
        if reason != self.reason:
            self.reason = reason
            row = self.row
            if reason is not None:
                row = dataclasses.replace(row, status=status, reason=reason)
            self.report.amend(row)
