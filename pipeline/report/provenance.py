"""Collect how results were made: times, runs, versions, settings and specifications."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pipeline.report.reading import Stores
from pipeline.storage import schema, store


@dataclass(frozen=True)
class StageTime:
    """Seconds that a stage took; None where they are not recorded."""

    stage: str
    seconds: float | None
    detail: str


@dataclass(frozen=True)
class Run:
    """One run of the distances stage."""

    started: str
    seconds: str
    blocks: str
    cluster: str
    workers: str


@dataclass(frozen=True)
class Provenance:
    """Provenance of results.

    Attributes
    ----------
    stages : list of StageTime
    runs : list of Run
        Of the distances stage.
    packages : dict of str to dict of str to str
        Version by package and stage.
    settings : dict of str to str
    specifications : dict of str to str
        By metric, laid out to be read.
    """

    stages: list[StageTime]
    runs: list[Run]
    packages: dict[str, dict[str, str]]
    settings: dict[str, str]
    specifications: dict[str, str]


def collect_provenance(record: dict[str, Any], stores: Stores) -> Provenance:
    """Collect how the results of a record were made."""
    runs = stores.attributes.get("runs", [])
    identity, source = record["identity"], stores.frames_attributes
    return Provenance(
        stages=[
            StageTime("convert", source.get("convert_seconds"), "its last run"),
            StageTime(
                "distances",
                sum(float(run.get("seconds", 0)) for run in runs) if runs else None,
                f"{len(runs)} run{'s' * (len(runs) != 1)}",
            ),
            StageTime("correlate", record["seconds"], f"{identity['replicates']} bootstrap replicates"),
        ],
        runs=[_describe_run(run) for run in runs],
        packages=_packages(
            {
                "convert": source.get("versions", {}),
                "distances": runs[-1].get("versions", {}) if runs else {},
                "correlate": record["versions"],
            }
        ),
        settings={
            "Protocols": ", ".join(identity["protocols"]),
            "Bootstrap": f"{identity['replicates']} replicates, seed {identity['seed']}, "
            f"{identity['level']:.0%} percentile intervals over sequences; of differences also "
            "simultaneous ones (max-T)",
            "Hash of the distances": identity["inputs"],
            "Distances": record["distances"],
            "Frames": _as_text(stores.attributes.get("frames", "")),
        },
        specifications=_specifications(stores.distances),
    )


def note_changed_distances(record: dict[str, Any], distances: str) -> list[str]:
    """Write a note where the distances have changed since they were correlated."""
    if record.get("revision") == store.revision(distances, schema.FINGERPRINT):
        return []
    return [
        "The distances have changed since these correlations were computed: curves and matrices here show "
        "the new ones. Run 'lsim correlate' again."
    ]


def _describe_run(run: dict[str, Any]) -> Run:
    return Run(
        started=_as_text(run.get("started", "")),
        seconds=_as_text(run.get("seconds", "")),
        blocks=_as_text(run.get("blocks", "")),
        cluster=_as_text(run.get("cluster", run.get("profile", ""))),
        workers=_as_text(run.get("workers", "")),
    )


def _packages(by_stage: dict[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Turn versions by stage and package into versions by package and stage."""
    packages: dict[str, dict[str, str]] = {}
    for stage, versions in by_stage.items():
        for package, version in versions.items():
            packages.setdefault(package, {})[stage] = str(version)
    return packages


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _specifications(path: str) -> dict[str, str]:
    """Lay out each metric's specification, from the first field that has it."""
    texts: dict[str, str] = {}
    for metric, specification in store.specifications(path):
        texts.setdefault(metric, json.dumps(specification, indent=2, ensure_ascii=False))
    return texts
