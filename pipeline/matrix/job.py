"""One matrix of a run: its frames, what of it is out of date, what it will take, and its tasks."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lsim.metric import Metric
from lsim.preprocess import Scope
from pipeline.matrix.frame_blocks import FrameBlock, MatrixFrames, list_frames
from pipeline.matrix.layout import describe, invalidate, label, lay_out, metric_places, sides, stale_tiles
from pipeline.matrix.machines import find_workers
from pipeline.matrix.measuring import Measured, measure
from pipeline.matrix.plan import FamilyPlan, Plan, Workers, choose_sides, order_squares, plan_family, room_for
from pipeline.matrix.tiles import TileTask, embeds_as
from pipeline.metrics.fields import field_units
from pipeline.metrics.pixel_weights import FieldMetrics, FieldWeights, weighted_otherwise
from pipeline.metrics.settings import Settings, is_directed
from pipeline.metrics.value_range import dataset_range, recorded_range
from pipeline.stage.bounded_map import run_bounded
from pipeline.storage import schema, store
from pipeline.storage.versions import versions
from pipeline.workers.cluster import Cluster
from pipeline.workers.worker_metrics import MetricRequest, dismiss_unfit_workers, prewarm

SAMPLES = 12
"""Blocks, evenly over the archive, of which the first that can be embedded is measured."""


@dataclass(frozen=True)
class MatrixRequest:
    """What is asked of an archive's matrix besides :class:`~pipeline.metrics.settings.Settings`.

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
    """What all matrices of a run share."""

    frames: str
    out: str
    settings: Settings
    matrix: MatrixRequest
    cluster: Cluster
    requests: dict[str, MetricRequest]
    run: str = field(default_factory=lambda: uuid.uuid4().hex)

    def make_ready(self) -> None:
        """Have the workers load the metrics, and send away those that cannot: no plan is made of them."""
        client = self.cluster.client
        if client is not None:
            dismiss_unfit_workers(client, list(self.requests.values()))
            prewarm(client, list(self.requests.values()))


class MatrixJob:
    """One matrix: its frames, what of it is out of date, its plan and its tasks."""

    def __init__(
        self, context: Context, key: str, source: store.Group, fields: Mapping[str, FieldMetrics]
    ) -> None:
        self.context = context
        self.key = key
        self.fields = list(fields)
        self._source = source
        self.metrics, self._weights = _in_common(fields)
        self.frames: MatrixFrames = list_frames(source, self.fields)
        self._units = field_units(source, self.fields)
        self._measured: dict[str, Measured] = {}
        self._workers: Workers | None = None
        self._plan: Plan | None = None
        self._places: dict[str, int] = {}
        self._blocks: list[FrameBlock] = []
        self._side = 1
        self._to_do: list[tuple[dict[str, np.ndarray], Scope]] = []
        _check_shapes(self.frames, context.settings)

    def families(self) -> list[list[Metric]]:
        """Metrics by what they are embedded as."""
        found: dict[Any, list[Metric]] = {}
        for metric in self.metrics:
            found.setdefault(embeds_as(metric), []).append(metric)
        return list(found.values())

    def _sequences(self) -> list[tuple[str, int, str]]:
        return [(piece.key, piece.row, piece.content) for piece in self.frames.sequences]

    def _group(self, out: str) -> store.Group | None:
        """The group as it is in the store, where it is."""
        if not store.exists(out):
            return None
        root = store.open_store(out)
        complete = f"{self.key}/{schema.PROVENANCE}/{schema.FINGERPRINT}"
        return store.get_group(root, self.key) if complete in root else None

    def _known_scope(self, group: store.Group, metric: Metric) -> Scope | None:
        if self.context.settings.scope != "dataset":
            return self.context.settings.scope
        provenance = store.get_group(group, schema.PROVENANCE)
        return recorded_range(self._sequences(), provenance, metric.preprocessing)

    def _stale(self, group: store.Group | None, tile: int) -> dict[str, np.ndarray]:
        """Of every metric, the tiles that are out of date as far as is known without reading frames."""
        blocks = self.frames.blocks(tile)
        stale = {}
        for metric in self.metrics:
            scope = None if group is None else self._known_scope(group, metric)
            if group is None or scope is None:
                stale[metric.name] = np.triu(np.ones((len(blocks), len(blocks)), bool))
            else:
                stale[metric.name] = stale_tiles(group, metric.name, metric.specification_hash, scope, blocks)
        return stale

    def is_stale(self, out: str) -> bool:
        """Whether anything may be to be done."""
        group = self._group(out)
        return group is None or any(one.any() for one in self._stale(group, sides(group)[0]).values())

    def plan(self, out: str) -> Plan:
        """Measure and plan; an error where it doesn't fit."""
        context = self.context
        self._workers = find_workers(context.cluster, context.matrix.memory)
        families = self.families()
        for family in families:
            self._measured[family[0].name] = self._measure(family)
        measured = [self._measured[family[0].name] for family in families]
        group = self._group(out)
        if group is None:
            tile, side = choose_sides(len(self.frames), measured, self._workers, context.matrix.tile)
        else:
            tile, side = sides(group)
            if context.matrix.tile not in (None, tile):
                raise ValueError(
                    f"{out}/{self.key} has tiles of {tile} frames a side, not {context.matrix.tile}: leave "
                    "--tile out, or choose another path"
                )
        stale = self._stale(group, tile)
        planned = tuple(self._plan_family(family, stale, tile, side) for family in families)
        self._plan = Plan(self.key, len(self.frames), tile, side, self._workers, planned)
        return self._plan

    def _plan_family(
        self, family: Sequence[Metric], stale: Mapping[str, np.ndarray], tile: int, side: int
    ) -> FamilyPlan:
        assert self._workers is not None
        names = [metric.name for metric in family]
        measured = self._measured[names[0]]
        tables = [stale[name] for name in names]
        return plan_family(names, tables, len(self.frames), tile, side, measured, self._workers)

    def _measure(self, family: Sequence[Metric]) -> Measured:
        requests = tuple(self.context.requests[metric.name] for metric in family)
        blocks = self.frames.blocks(8)
        # The first would do, but for those whose first frames are damaged or hold NaN.
        step = max(1, len(blocks) // SAMPLES)
        sample = tuple(blocks[::step][:SAMPLES])
        physical = self.context.settings.scope == "none"
        sizes = (self.frames.sequence_bytes, len(self.frames))
        task = (self.context.frames, requests, sample, *sizes, physical, self._weights)
        for _, result, error in run_bounded(self.context.cluster.client, measure, [task]):
            if error is not None:
                raise error
            return result
        raise AssertionError("a task has an outcome")

    def prepare(self, root: store.Group) -> int:
        """Bring the group into shape, and declare what is out of date; returns how many tiles are not."""
        context = self.context
        group = self._group(context.out)
        if group is not None:
            tile, side = sides(group)
        elif self._plan is not None:
            tile, side = self._plan.tile, self._plan.side
        else:
            raise store.StoreError(f"{context.out}: {self.key} vanished while it was looked at")
        units = {metric.name: metric.units(context.settings.scope, self._units) for metric in self.metrics}
        group = lay_out(root, self.key, self.frames, units, tile, side)
        for metric in self.metrics:
            store.set_directed(store.get_array(group, metric.name), is_directed(metric))
        provenance = store.get_group(group, schema.PROVENANCE)
        scopes = {metric.name: self._scope(provenance, metric) for metric in self.metrics}
        blocks = self.frames.blocks(tile)
        stale = {
            metric.name: stale_tiles(
                group, metric.name, metric.specification_hash, scopes[metric.name], blocks
            )
            for metric in self.metrics
        }
        others = {
            name
            for key in self.fields
            for name in weighted_otherwise(group, store.get_group(self._source, key))
        }
        invalidate(group, blocks, stale, others - stale.keys())
        label(group, self.frames)
        store.set_attributes(group, {"groups": self.fields, "scope": context.settings.scope})
        describe(
            group,
            {
                metric.name: metric.specification()
                | {"scope": scopes[metric.name], "versions": versions()}
                | ({schema.DIRECTED: True} if is_directed(metric) else {})
                for metric in self.metrics
                if stale[metric.name].any()
            },
        )
        self._places = metric_places(group)
        self._blocks, self._side = blocks, side
        self._to_do = [
            ({metric.name: stale[metric.name] for metric in family}, scopes[family[0].name])
            for family in self.families()
            if any(stale[metric.name].any() for metric in family)
        ]
        if self._to_do and self._workers is None:
            # Only what was taken for up to date is not: a range changed between a look and the lock.
            context.make_ready()
            self.plan(context.out)
        return sum(len(blocks) * (len(blocks) + 1) // 2 - int(table.sum()) for table in stale.values())

    def count(self) -> int:
        """Tasks there are."""
        return sum(len(list(self._squares(tables))) for tables, _ in self._to_do)

    def _squares(self, tables: Mapping[str, np.ndarray]) -> Iterator[tuple[int, int]]:
        return order_squares(np.logical_or.reduce(list(tables.values())), self._side)

    def tasks(self) -> Iterator[tuple[TileTask]]:
        """The tasks, made as they are asked for: together they would take more than their tiles."""
        for tables, scope in self._to_do:
            yield from self._tasks_of(tables, scope)

    def _scope(self, provenance: store.Group, metric: Metric) -> Scope:
        context = self.context
        if context.settings.scope != "dataset":
            return context.settings.scope
        return dataset_range(
            context.cluster, context.frames, self._sequences(), provenance, metric.preprocessing
        )

    def _tasks_of(
        self,
        tables: Mapping[str, np.ndarray],
        scope: Scope,
    ) -> Iterator[tuple[TileTask]]:
        context, blocks, side = self.context, self._blocks, self._side
        assert self._workers is not None
        measured = self._measured[next(iter(tables))]
        room = room_for(measured, self._workers, len(blocks[0]))
        for row, column in self._squares(tables):
            tiles = {}
            for name, table in tables.items():
                part = table[row * side : (row + 1) * side, column * side : (column + 1) * side]
                found = tuple((row * side + int(i), column * side + int(j)) for i, j in np.argwhere(part))
                if found:
                    tiles[name] = found
            needed = sorted({index for found in tiles.values() for pair in found for index in pair})
            yield (
                TileTask(
                    context.frames,
                    context.out,
                    self.key,
                    tuple(context.requests[name] for name in tiles),
                    {name: self._places[name] for name in tiles},
                    tiles,
                    {index: blocks[index] for index in needed},
                    scope,
                    measured.frame_bytes,
                    room,
                    context.run,
                    self._weights,
                ),
            )


def _in_common(fields: Mapping[str, FieldMetrics]) -> tuple[list[Metric], FieldWeights | None]:
    """Give the metrics and weights that all fields of a matrix have.

    Raises
    ------
    ValueError
        When the fields have other weights.
    """
    first = next(iter(fields.values()))
    if others := [key for key, one in fields.items() if one.weights != first.weights]:
        raise ValueError(
            f"{', '.join(others)} and {next(iter(fields))} have pixels of other weights, and frames of one "
            "matrix are compared with the same: choose --groups that agree, or leave out --pixel-weights"
        )
    return first.metrics, first.weights


def _check_shapes(frames: MatrixFrames, settings: Settings) -> None:
    """Frames of several fields can be compared where they come out alike."""
    channels = {3 if shape[2] == 4 else shape[2] for shape in frames.shapes.values()}
    sizes = {shape[:2] for shape in frames.shapes.values()}
    if len(channels) > 1 or (settings.size is None and len(sizes) > 1):
        shapes = ", ".join(f"{key} {'×'.join(map(str, shape))}" for key, shape in frames.shapes.items())
        raise ValueError(
            f"frames of different channels, or of different sizes that aren't resized, have no distances: "
            f"{shapes}; choose --groups that agree, or give --size"
        )
