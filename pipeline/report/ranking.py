"""Rank the metrics: the headline, the main table, and the tables of all other statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd

Verdict = Literal["apart", "even", "unknown"]
Kind = Literal["sets", "fields"]


@dataclass(frozen=True)
class Cell:
    """One metric's value on one set, with its interval.

    Attributes
    ----------
    metric : str
    value, low, high : float
    left_out : int
    mark : str
        "best", "even" (not told apart from the best) or empty.
    std : float or None
        Standard deviation beside a mean over sequences.
    """

    metric: str
    value: float
    low: float
    high: float
    left_out: int
    mark: str = ""
    std: float | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Cell:
        """Make the cell of a row of the table of correlations."""
        return cls(row["metric"], row["value"], row["low"], row["high"], row["left_out"])


@dataclass(frozen=True)
class TableRow:
    """A metric's cells, one for each column of a table."""

    metric: str
    cells: list[Cell]


@dataclass(frozen=True)
class FurtherTable:
    """The table of one statistic and protocol.

    Attributes
    ----------
    protocol, statistic : str
    kind : str
        Kind of the columns: sets or fields.
    columns : list of str
    rows : list of TableRow
    """

    protocol: str
    statistic: str
    kind: Kind
    columns: list[str]
    rows: list[TableRow]


@dataclass(frozen=True)
class Comparison:
    """The best metric of a set against another one.

    Attributes
    ----------
    metric : str
        The other metric.
    value : float
        The other metric's value.
    difference, low, high : float
        How much better the best is, with the interval of this difference by itself.
    low_simultaneous, high_simultaneous : float
        Interval that holds for all differences of the set at once.
    """

    metric: str
    value: float
    difference: float
    low: float
    high: float
    low_simultaneous: float
    high_simultaneous: float

    @property
    def verdict(self) -> Verdict:
        """Verdict on whether the simultaneous interval of their difference separates the two metrics.

        The best was picked on the same sequences, out of all: the interval of one difference by itself would
        call the best of equals better than another far too often.
        """
        low, high = self.low_simultaneous, self.high_simultaneous
        if math.isnan(low) or math.isnan(high):
            return "unknown"
        return "apart" if low > 0 or high < 0 else "even"


@dataclass(frozen=True)
class Headline:
    """The best metric on one pool or set.

    Attributes
    ----------
    dataset : str
        Name of the pool or set.
    pool : bool
    members : list of str
        Data sets with figures.
    sequences, left_out : int
        Those that the best metric is ranked on, and others.
    ranked : int
        Metrics with a value.
    comparisons : int
        Differences that the simultaneous intervals hold for.
    metric : str or None
        The best metric; None where no metric has a value.
    value, low, high : float
    rivals : list of Comparison
        All other ranked metrics, from better to worse.
    """

    dataset: str
    pool: bool
    members: list[str]
    sequences: int
    left_out: int
    ranked: int
    comparisons: int
    metric: str | None
    value: float
    low: float
    high: float
    rivals: list[Comparison]

    @property
    def runner_up(self) -> Comparison | None:
        """The second best metric."""
        return self.rivals[0] if self.rivals else None

    @property
    def peers(self) -> list[str]:
        """Metrics that cannot be told apart from the best."""
        return [comparison.metric for comparison in self.rivals if comparison.verdict == "even"]


def rank_metrics(main: pd.DataFrame, dataset: str, metrics: Sequence[str]) -> list[str]:
    """Sort metrics from best to worst on a set or pool; those without a value are last."""
    values = main[(main.dataset == dataset) & (main.field == "all")].set_index("metric")["value"].to_dict()
    return sorted(metrics, key=lambda m: -values[m] if not math.isnan(values[m]) else math.inf)


def make_headline(
    main: pd.DataFrame, differences: pd.DataFrame, names: Sequence[str], pools: Mapping[str, list[str]]
) -> Headline:
    """Find the best metric on the first pool; without pools, on the set with the most sequences.

    Parameters
    ----------
    main, differences : DataFrame
        Tables of one protocol and statistic.
    names : sequence of str
        Sets and pools of the tables.
    pools : mapping of str to list of str
        Members of each pool.
    """
    pooled = main[main.field == "all"]
    sequences = pooled.groupby("dataset")["sequences"].max()
    first_pool = next((name for name in names if name in pools), None)
    dataset = first_pool or max(names, key=lambda name: int(sequences[name]))
    of_dataset = pooled[pooled.dataset == dataset]
    ranks = records(of_dataset.dropna(subset=["value"]).sort_values("value", ascending=False))
    rivals = []
    if ranks:
        values = {row["metric"]: row["value"] for row in ranks}
        by_metric = _compare_with_best(differences, dataset, ranks[0]["metric"], values)
        rivals = [by_metric[row["metric"]] for row in ranks[1:]]
    best = Cell.of(ranks[0]) if ranks else None
    own = int(ranks[0]["sequences"]) if ranks else 0
    simultaneous = differences[differences.dataset == dataset]["low_simultaneous"]
    return Headline(
        dataset=dataset,
        pool=dataset in pools,
        members=[name for name in pools.get(dataset, [dataset]) if name in names],
        sequences=own,
        left_out=int(sequences[dataset]) - own,
        ranked=len(ranks),
        comparisons=int(simultaneous.notna().sum()),
        metric=best.metric if best is not None else None,
        value=best.value if best is not None else math.nan,
        low=best.low if best is not None else math.nan,
        high=best.high if best is not None else math.nan,
        rivals=rivals,
    )


def _compare_with_best(
    differences: pd.DataFrame, dataset: str, best: str, values: Mapping[str, float]
) -> dict[str, Comparison]:
    """Compare the best metric of a set with each other one that has a value."""
    comparisons = {}
    for row in records(differences[differences.dataset == dataset]):
        a, b = row["metric"], row["metric_other"]
        if a == best and b in values:
            comparisons[b] = Comparison(
                metric=b,
                value=values[b],
                difference=row["difference"],
                low=row["low"],
                high=row["high"],
                low_simultaneous=row["low_simultaneous"],
                high_simultaneous=row["high_simultaneous"],
            )
        elif b == best and a in values:
            # The table has the difference the other way round.
            comparisons[a] = Comparison(
                metric=a,
                value=values[a],
                difference=-row["difference"],
                low=-row["high"],
                high=-row["low"],
                low_simultaneous=-row["high_simultaneous"],
                high_simultaneous=-row["low_simultaneous"],
            )
    return comparisons


def make_rows(
    main: pd.DataFrame, differences: pd.DataFrame, metrics: Sequence[str], names: Sequence[str]
) -> list[TableRow]:
    """Make the main table: a row a metric, a cell a set, with the best and its equals marked."""
    cells = {(row["metric"], row["dataset"]): Cell.of(row) for row in records(main[main.field == "all"])}
    for name in names:
        values = {m: cells[m, name].value for m in metrics if not math.isnan(cells[m, name].value)}
        if not values:
            continue
        best = max(values, key=lambda m: values[m])
        comparisons = _compare_with_best(differences, name, best, values)
        for metric, value in values.items():
            if value == values[best]:
                cells[metric, name] = replace(cells[metric, name], mark="best")
            elif metric in comparisons and comparisons[metric].verdict == "even":
                cells[metric, name] = replace(cells[metric, name], mark="even")
    return [TableRow(metric, [cells[metric, name] for name in names]) for metric in metrics]


def make_further_tables(
    correlations: pd.DataFrame, metrics: Sequence[str], protocol: str, statistic: str
) -> list[FurtherTable]:
    """Make all tables but the main one, which is that of ``protocol`` and ``statistic``.

    Sets come first and then single fields. Standard deviations stand beside their means.
    """
    tables = []
    by_kind: dict[Kind, pd.DataFrame] = {
        "sets": correlations[correlations.field == "all"],
        "fields": correlations[correlations.field != "all"],
    }
    for kind, table in by_kind.items():
        for pair in dict.fromkeys(zip(table.protocol, table.statistic, strict=True)):
            is_main = kind == "sets" and pair == (protocol, statistic)
            if not is_main and not pair[1].endswith("Std"):
                tables.append(_make_further_table(table, metrics, pair, kind))
    return tables


def _make_further_table(
    correlations: pd.DataFrame, metrics: Sequence[str], pair: tuple[str, str], kind: Kind
) -> FurtherTable:
    """Make the table of one pair of protocol and statistic."""
    protocol, statistic = pair
    of_protocol = correlations[correlations.protocol == protocol]
    group = of_protocol[of_protocol.statistic == statistic]
    places = list(dict.fromkeys(zip(group.dataset, group.field, strict=True)))
    cells = {(row["metric"], row["dataset"], row["field"]): Cell.of(row) for row in records(group)}
    if statistic.endswith("Mean"):
        for row in records(of_protocol[of_protocol.statistic == statistic.replace("Mean", "Std")]):
            place = (row["metric"], row["dataset"], row["field"])
            cells[place] = replace(cells[place], std=row["value"])
    return FurtherTable(
        protocol=protocol,
        statistic=statistic,
        kind=kind,
        columns=[dataset if field == "all" else f"{dataset}/{field}" for dataset, field in places],
        rows=[TableRow(metric, [cells[metric, *place] for place in places]) for metric in metrics],
    )


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Convert the rows of a table into plain dictionaries."""
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]
