"""One matrix of a run: its frames, its plan, its stale tiles, and the tasks that compute them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from distributed import Client

from lsim.metric import Metric
from lsim.preprocess import Scope
from pipeline.matrix.frame_blocks import FrameBlock, MatrixFrames, list_frames
from pipeline.matrix.layout import invalidate, label, lay_out, sides, stale_tiles
from pipeline.matrix.measuring import Measured, measure
from pipeline.matrix.plan import Plan, Workers, choose_sides, order_squares, plan_family, room_for
from pipeline.matrix.tiles import TileTask, embeds_as
from pipeline.metrics.fields import field_units
from pipeline.metrics.pixel_weights import FieldMetrics, FieldWeights, weighted_otherwise
from pipeline.metrics.settings import Settings, is_directed
from pipeline.metrics.value_range import dataset_range, recorded_range
from pipeline.stage.bounded_map import run_bounded
from pipeline.stage.provenance import metric_places, record_specifications, specification_of
from pipeline.storage import schema, store
from pipeline.workers.cluster import Cluster
from pipeline.workers.worker_metrics import MetricRequest

SAMPLES = 12
"""Blocks, evenly over the archive, of which the first that can be embedded is measured."""


@dataclass(frozen=True)
class MatrixRequest:
    """Options of an archive's matrix besides :class:`~pipeline.metrics.settings.Settings`.

    Attributes
    ----------
    groups : tuple of str
        Keys of fields, or patterns such as ``B/*``; all where there are none.
    together : str, optional
        One matrix over all these fields, under this name, instead of one for each.
    tile : int, optional
        Frames on a side of a tile, of a store that is new. Default: as many as suit.
    memory : int, optional
        Bytes that each worker may take, or its GPU has. Default: a share of what there is.
    """

    groups: tuple[str, ...] = ()
    together: str | None = None
    tile: int | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        if self.together is not None and not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", self.together):
            raise ValueError(f"a name is made of letters, digits, '_', '.', '+', '-'; got {self.together!r}")
        if self.tile is not None and self.tile < 1:
            raise ValueError(f"tile must be at least 1 frame, got {self.tile}")


@dataclass(frozen=True)
class Context:
    """Settings that all matrices of a run share."""

    frames: str
    out: str
    settings: Settings
    matrix: MatrixRequest
    requests: Mapping[str, MetricRequest]


@dataclass(frozen=True)
class StaleTiles:
    """Tiles of a matrix that are out of date.

    Attributes
    ----------
    families : list of list of Metric
        Metrics with stale tiles, by what they are embedded as.
    tables : dict of str to ndarray of bool
        By metric, the tiles (i, j), i <= j.
    scopes : dict of str to scope
        By metric.
    places : dict of str to int
        Index of each metric in provenance.
    blocks : list of FrameBlock
    side : int
        Tiles on a side of a task.
    """

    families: list[list[Metric]]
    tables: Mapping[str, np.ndarray]
    scopes: Mapping[str, Scope]
    places: Mapping[str, int]
    blocks: Sequence[FrameBlock]
    side: int

    @property
    def fresh(self) -> int:
        """Number of tiles on and above the diagonal that are up to date."""
        count = len(self.blocks)
        return sum(count * (count + 1) // 2 - int(table.sum()) for table in self.tables.values())

    @property
    def count(self) -> int:
        """Number of tasks."""
        return sum(len(list(self.squares(family))) for family in self.families)

    def squares(self, family: Sequence[Metric]) -> Iterator[tuple[int, int]]:
        """Order the squares of a family that hold stale tiles."""
        tables = [self.tables[metric.name] for metric in family]
        return order_squares(np.logical_or.reduce(tables), self.side)

    def tiles(self, metric: str, square: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """List the stale tiles of a metric in a square."""
        row, column = (index * self.side for index in square)
        part = self.tables[metric][row : row + self.side, column : column + self.side]
        return tuple((row + int(i), column + int(j)) for i, j in np.argwhere(part))


class MatrixJob:
    """One matrix: the group that it is written to, its fields, frames and metrics.

    Parameters
    ----------
    context : Context
    key : str
        ``<dataset>/<field>`` or ``together/<name>``.
    source : Group
        Root of the ``frames.zarr``.
    fields : mapping of str to FieldMetrics
        By key, the fields whose frames are compared.
    """

    def __init__(
        self, context: Context, key: str, source: store.Group, fields: Mapping[str, FieldMetrics]
    ) -> None:
        self.context = context
        self.key = key
        self.fields = list(fields)
        self.metrics, self.weights = _in_common(fields)
        self.frames: MatrixFrames = list_frames(source, self.fields)
        self._source = source
        _check_shapes(self.frames, context.settings)

    def families(self) -> list[list[Metric]]:
        """Group the metrics by what they are embedded as."""
        families: dict[Any, list[Metric]] = {}
        for metric in self.metrics:
            families.setdefault(embeds_as(metric), []).append(metric)
        return list(families.values())

    def is_stale(self) -> bool:
        """Tell whether any tile may be stale, as far as is known without reading frames."""
        group = self._group()
        return group is None or any(table.any() for table in self._tables(group, sides(group)[0]).values())

    def measure(self, client: Client | None) -> dict[str, Measured]:
        """Measure on a worker what each family takes; by the name of the family's first metric."""
        return {family[0].name: self._measure(family, client) for family in self.families()}

    def plan(self, measurements: Mapping[str, Measured], workers: Workers) -> Plan:
        """Plan the matrix.

        Raises
        ------
        pipeline.matrix.plan.PlanError
            When it doesn't fit the memory of the workers.
        ValueError
            When the store has tiles of another size than is asked for.
        """
        context, group = self.context, self._group()
        if group is None:
            tile, side = choose_sides(
                len(self.frames), list(measurements.values()), workers, context.matrix.tile
            )
        else:
            tile, side = sides(group)
            if context.matrix.tile not in (None, tile):
                raise ValueError(
                    f"{context.out}/{self.key} has tiles of {tile} frames a side, not {context.matrix.tile}: "
                    "leave --tile out, or choose another path"
                )
        tables = self._tables(group, tile)
        families = tuple(
            plan_family(
                [metric.name for metric in family],
                [tables[metric.name] for metric in family],
                len(self.frames),
                tile,
                side,
                measurements[family[0].name],
                workers,
            )
            for family in self.families()
        )
        return Plan(self.key, len(self.frames), tile, side, workers, families)

    def lay_out(self, root: store.Group, plan: Plan | None) -> store.Group:
        """Bring the group into shape: as it is in the store, or as planned."""
        group = self._group()
        if group is not None:
            tile, side = sides(group)
        elif plan is not None:
            tile, side = plan.tile, plan.side
        else:
            raise store.StoreError(f"{self.context.out}: {self.key} vanished while it was looked at")
        units = field_units(self._source, self.fields)
        metrics = {metric.name: metric.units(self.context.settings.scope, units) for metric in self.metrics}
        group = lay_out(root, self.key, self.frames, metrics, tile, side)
        for metric in self.metrics:
            store.set_directed(store.get_array(group, metric.name), is_directed(metric))
        return group

    def find_scopes(self, group: store.Group, cluster: Cluster) -> dict[str, Scope]:
        """Find the scope of each metric; the range of all frames is computed where it isn't recorded."""
        scope = self.context.settings.scope
        if scope != "dataset":
            return {metric.name: scope for metric in self.metrics}
        provenance, frames = store.get_group(group, schema.PROVENANCE), self.context.frames
        return {
            metric.name: dataset_range(cluster, frames, self._sequences(), provenance, metric.preprocessing)
            for metric in self.metrics
        }

    def list_stale(self, group: store.Group, scopes: Mapping[str, Scope]) -> StaleTiles:
        """List the tiles that are out of date, and delete their fingerprints before anything changes."""
        tile, side = sides(group)
        blocks = self.frames.blocks(tile)
        tables = {
            metric.name: stale_tiles(
                group, metric.name, metric.specification_hash, scopes[metric.name], blocks
            )
            for metric in self.metrics
        }
        other_specifications = {
            name
            for key in self.fields
            for name in weighted_otherwise(group, store.get_group(self._source, key))
        }
        invalidate(group, blocks, tables, other_specifications - tables.keys())
        families = [
            family for family in self.families() if any(tables[metric.name].any() for metric in family)
        ]
        return StaleTiles(families, tables, scopes, metric_places(group), blocks, side)

    def describe(self, group: store.Group, stale: StaleTiles) -> None:
        """Record the labels of the frames, and the specification of the metrics that are stale."""
        label(group, self.frames)
        store.set_attributes(group, {"groups": self.fields, "scope": self.context.settings.scope})
        record_specifications(
            group,
            {
                metric.name: specification_of(metric, stale.scopes[metric.name], is_directed(metric))
                for metric in self.metrics
                if stale.tables[metric.name].any()
            },
        )

    def tasks(
        self, stale: StaleTiles, measurements: Mapping[str, Measured], workers: Workers, run: str
    ) -> Iterator[tuple[TileTask]]:
        """Make the tasks as they are asked for: together they would take more than their tiles."""
        context = self.context
        for family in stale.families:
            measurement = measurements[family[0].name]
            room = room_for(measurement, workers, len(stale.blocks[0]))
            for square in stale.squares(family):
                tiles = {metric.name: stale.tiles(metric.name, square) for metric in family}
                tiles = {name: of_metric for name, of_metric in tiles.items() if of_metric}
                block_indices = sorted(
                    {index for of_metric in tiles.values() for tile in of_metric for index in tile}
                )
                task = TileTask(
                    context.frames,
                    context.out,
                    self.key,
                    tuple(context.requests[name] for name in tiles),
                    {name: stale.places[name] for name in tiles},
                    tiles,
                    {index: stale.blocks[index] for index in block_indices},
                    stale.scopes[family[0].name],
                    measurement.frame_bytes,
                    room,
                    run,
                    self.weights,
                )
                yield (task,)

    def _sequences(self) -> list[tuple[str, int, str]]:
        return [(piece.key, piece.row, piece.content) for piece in self.frames.sequences]

    def _group(self) -> store.Group | None:
        """Open the group as it is in the store, where it is complete."""
        if not store.exists(self.context.out):
            return None
        root = store.open_store(self.context.out)
        complete = f"{self.key}/{schema.PROVENANCE}/{schema.FINGERPRINT}"
        return store.get_group(root, self.key) if complete in root else None

    def _recorded_scope(self, group: store.Group, metric: Metric) -> Scope | None:
        if self.context.settings.scope != "dataset":
            return self.context.settings.scope
        provenance = store.get_group(group, schema.PROVENANCE)
        return recorded_range(self._sequences(), provenance, metric.preprocessing)

    def _tables(self, group: store.Group | None, tile: int) -> dict[str, np.ndarray]:
        """List the stale tiles of every metric, as far as they are known without reading frames."""
        blocks = self.frames.blocks(tile)
        tables = {}
        for metric in self.metrics:
            scope = None if group is None else self._recorded_scope(group, metric)
            if group is None or scope is None:
                tables[metric.name] = np.triu(np.ones((len(blocks), len(blocks)), bool))
            else:
                hashed = metric.specification_hash
                tables[metric.name] = stale_tiles(group, metric.name, hashed, scope, blocks)
        return tables

    def _measure(self, family: Sequence[Metric], client: Client | None) -> Measured:
        requests = tuple(self.context.requests[metric.name] for metric in family)
        blocks = self.frames.blocks(8)
        # The first would do, but for archives whose first frames are damaged or hold NaN.
        step = max(1, len(blocks) // SAMPLES)
        task = (
            self.context.frames,
            requests,
            tuple(blocks[::step][:SAMPLES]),
            self.frames.sequence_bytes,
            len(self.frames),
            self.context.settings.scope == "none",
            self.weights,
        )
        ((_, measurement, error),) = run_bounded(client, measure, [task])
        if error is not None:
            raise error
        return measurement


def _in_common(fields: Mapping[str, FieldMetrics]) -> tuple[list[Metric], FieldWeights | None]:
    """Give the metrics and weights of pixels that all fields of a matrix have.

    Raises
    ------
    ValueError
        When the fields have other weights.
    """
    first = next(iter(fields.values()))
    if odd_keys := [key for key, of_field in fields.items() if of_field.weights != first.weights]:
        raise ValueError(
            f"{', '.join(odd_keys)} and {next(iter(fields))} have pixels of other weights, and frames of one "
            "matrix are compared with the same: choose --groups that agree, or leave out --pixel-weights"
        )
    return first.metrics, first.weights


def _check_shapes(frames: MatrixFrames, settings: Settings) -> None:
    """Refuse fields whose frames differ in channels, or in a size that isn't changed."""
    channels = {3 if shape[2] == 4 else shape[2] for shape in frames.shapes.values()}
    sizes = {shape[:2] for shape in frames.shapes.values()}
    if len(channels) > 1 or (settings.size is None and len(sizes) > 1):
        shapes = ", ".join(f"{key} {'×'.join(map(str, shape))}" for key, shape in frames.shapes.items())
        raise ValueError(
            f"frames of different channels, or of different sizes that aren't resized, have no distances: "
            f"{shapes}; choose --groups that agree, or give --size"
        )
