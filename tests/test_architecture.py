"""The arrows of the design, read from the imports of every module.

cli → workflow → stages (convert, distances, correlate, report) → schema, store; distances → cluster → lsim;
readers → catalog. Imports inside functions and under ``TYPE_CHECKING`` count as imports.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("lsim", "pipeline")
STAGES = (
    "pipeline.convert",
    "pipeline.distances",
    "pipeline.correlate",
    "pipeline.report",
    "pipeline.archive",
    "pipeline.embeddings",
)
PARTS_OF_STAGES = {
    "pipeline.distances.blocks": "pipeline.distances",
    "pipeline.distances.compute": "pipeline.distances",
    "pipeline.distances.sizing": "pipeline.distances",
    "pipeline.shards": "pipeline.convert",
    "pipeline.embedding_cache": "pipeline.archive",
    "pipeline.frame_blocks": "pipeline.archive",
    "pipeline.archive.job": "pipeline.archive",
    "pipeline.archive.machines": "pipeline.archive",
    "pipeline.archive.matrix": "pipeline.archive",
    "pipeline.archive.measuring": "pipeline.archive",
    "pipeline.archive.plan": "pipeline.archive",
    "pipeline.archive.tiles": "pipeline.archive",
}
"""Modules that belong to one stage; ``pipeline.statistics`` knows arrays alone, and is anybody's."""
LEAVES = (
    "pipeline.versions",
    "pipeline.resources",
    "pipeline.statistics",
    "pipeline.scaling",
    "pipeline.address",
    "pipeline.names",
    "pipeline.limits",
    "pipeline.tables",
    "pipeline.text_chunks",
    "pipeline.digests",
)
SHARED_BY_STAGES = (
    "pipeline.metric_choice",
    "pipeline.fields",
    "pipeline.scopes",
    "pipeline.batches",
    "pipeline.trials",
    "pipeline.pixel_weights",
)
"""What several stages ask: which metrics, over which range frames are normalised, what where one raises, by
what means are weighted."""
WORKERS = (
    "pipeline.workers.cluster",
    "pipeline.workers.credentials",
    "pipeline.workers.departure",
    "pipeline.workers.deployment",
    "pipeline.workers.packed",
    "pipeline.workers.profiles",
    "pipeline.workers.resident",
    "pipeline.workers.starting",
    "pipeline.workers.stopping",
    "pipeline.workers.submission",
)
"""How stages get at workers: profiles below, the cluster above."""
KNOW_DASK = (
    *WORKERS,
    "pipeline.convert",
    "pipeline.distances",
    "pipeline.archive",
    "pipeline.archive.machines",
    "pipeline.workflow",
)
CHECKERS = ("pipeline.verify", "pipeline.verify.damage", "pipeline.verify.repair", "pipeline.verify.tiles")
"""What compares what stages wrote with what they recorded of it."""
COMPOSERS = ("pipeline.workflow", "pipeline.cluster_check")
"""Who compose stages: a whole run, and a small one that tells how fit a cluster is."""
KNOW_ZARR = ("pipeline.store", "pipeline.schema")


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, module: str, is_package: bool) -> set[str]:
    """Full dotted names that a module imports: ``from a import b`` gives both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                up = parents[: len(parents) - node.level + is_package]
                base = ".".join([*up, *filter(None, [base])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return found


def _called(node: ast.Call) -> str:
    target = node.func
    return target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def imports() -> dict[str, set[str]]:
    """Module → what it imports, for every module of the project."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = module_name(path, ROOT)
            found[name] = imports_of(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")
    return found


IMPORTS = imports()


def offenders(importers: str | tuple[str, ...], *imported: str) -> Iterator[str]:
    """``a → b`` for every import of ``imported`` packages in modules within ``importers``."""
    within = (importers,) if isinstance(importers, str) else importers
    for module, names in IMPORTS.items():
        if any(is_within(module, package) for package in within):
            for name in sorted(names):
                if any(is_within(name, package) for package in imported):
                    yield f"{module} → {name}"


def test_modules_are_read() -> None:
    assert {
        "lsim.metric",
        "lsim.metrics.learned",
        "pipeline.store",
        "pipeline.workers.cluster",
    } <= IMPORTS.keys()
    assert any(is_within(name, "lsim") for name in IMPORTS["pipeline.workers.resident"])


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
import a.b as c
from d import e
from . import near
from .near import thing
from ..far import other
if TYPE_CHECKING:
    from f import g
def function():
    import h
    importlib.import_module("i.j")
"""
    found = imports_of(source, "package.sub.module", is_package=False)
    assert {"a.b", "d", "d.e", "f", "f.g", "h", "i.j"} <= found
    assert {"package.sub.near", "package.sub.near.thing", "package.far.other"} <= found
    assert "package.sub.near" in imports_of("from . import near", "package.sub", is_package=True)


def test_library_knows_nothing_of_the_pipeline() -> None:
    assert not list(offenders("lsim", "pipeline", "dask", "distributed", "zarr", "xarray"))


def test_metrics_do_not_import_one_another() -> None:
    families = [name for name in IMPORTS if name.startswith("lsim.metrics.")]
    assert len(families) >= 4
    for family in families:
        others = [other for other in families if other != family]
        assert not list(offenders(family, *others))


def test_simulations_stand_apart_from_metrics() -> None:
    assert not list(offenders("lsim.simulate", "lsim.metric", "lsim.metrics", "lsim.registry"))
    # An export is compared with the metric on a plume.
    others = [
        name
        for name in IMPORTS
        if is_within(name, "lsim") and not is_within(name, "lsim.simulate") and name != "lsim.export"
    ]
    for module in others:
        assert not [name for name in IMPORTS[module] if is_within(name, "lsim.simulate")], module


def test_preprocessing_and_networks_are_below_the_metrics() -> None:
    lower = (
        "lsim.preprocess",
        "lsim.embedding",
        "lsim.prepared",
        "lsim.networks",
        "lsim.pairs",
        "lsim.products",
        "lsim.precision",
        "lsim.ieee",
        "lsim.resampling",
        "lsim.weights",
    )
    assert not list(offenders(lower, "lsim.metric", "lsim.metrics", "lsim.registry"))
    assert not list(offenders(("lsim.metric", "lsim.metrics"), "lsim.registry", "lsim.testing"))


@pytest.mark.parametrize(
    ("packages", "allowed"),
    [
        (("dask", "distributed"), KNOW_DASK),
        (("zarr",), KNOW_ZARR),
        (("obstore",), ("pipeline.objects",)),
        (("cv2",), ("lsim.metrics.flow",)),
        (("torchvision", "pyiqa"), ()),
    ],
)
def test_who_knows_what(packages: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    others = tuple(module for module in IMPORTS if module not in allowed)
    for module in others:
        assert not [n for n in IMPORTS[module] if any(is_within(n, p) for p in packages)], module


def test_stages_do_not_import_one_another() -> None:
    for stage in STAGES:
        others = [other for other in STAGES if other != stage]
        parts = [part for part, owner in PARTS_OF_STAGES.items() if owner != stage]
        assert not list(offenders(stage, *others, *parts))


def test_parts_serve_their_stage_alone() -> None:
    """Nobody but its stage, what composes stages and what checks their work imports a part of one."""
    for part, stage in PARTS_OF_STAGES.items():
        users = [m for m, names in IMPORTS.items() if part in names and m != part]
        assert set(users) <= {stage, *COMPOSERS, "pipeline.cli", *CHECKERS, *_siblings(stage)}, part
        assert not IMPORTS[part] & {*STAGES, "pipeline.workflow", "pipeline.cli"}, part
        others = [other for other in STAGES if other != stage]
        assert not list(offenders(part, *others))


def _siblings(stage: str) -> list[str]:
    return [part for part, owner in PARTS_OF_STAGES.items() if owner == stage]


def test_nothing_below_imports_what_is_above() -> None:
    above = {
        ("pipeline.schema", "pipeline.store"): (*STAGES, *WORKERS, "pipeline.catalog"),
        ("pipeline.locks", "pipeline.objects"): (*STAGES, *WORKERS, "pipeline.store", "pipeline.catalog"),
        WORKERS: (*STAGES, "pipeline.store", "pipeline.schema", "pipeline.readers"),
        ("pipeline.workers.profiles", "pipeline.workers.departure"): tuple(
            set(WORKERS) - {"pipeline.workers.profiles"}
        ),
        ("pipeline.workers.credentials",): ("pipeline.workers.cluster", "pipeline.workers.deployment"),
        ("pipeline.workers.deployment",): ("pipeline.workers.cluster",),
        ("pipeline.workers.resident",): ("pipeline.workers.cluster", "pipeline.workers.submission"),
        ("pipeline.catalog",): (*STAGES, "pipeline.readers", "pipeline.store", *WORKERS),
        ("pipeline.readers",): (*STAGES, "pipeline.store", *WORKERS),
        SHARED_BY_STAGES: (*STAGES, *PARTS_OF_STAGES, "pipeline.workflow"),
        (*STAGES,): ("pipeline.workflow",),
    }
    for below, higher in above.items():
        assert not list(offenders(below, *higher))
    command = ("pipeline.cli", "pipeline.__main__")
    everything_but_cli = tuple(module for module in IMPORTS if module not in command)
    assert {m for m in IMPORTS if "pipeline.display" in IMPORTS[m]} == {"pipeline.cli"}
    for module in everything_but_cli:
        assert "pipeline.cli" not in IMPORTS[module], module
        if module != "pipeline.workflow":
            assert "pipeline.workflow" not in IMPORTS[module], module


def test_simulated_data_sets_are_made_from_the_command_alone() -> None:
    users = {m for m in IMPORTS if m != "pipeline.simulate" and list(offenders(m, "pipeline.simulate"))}
    assert users <= {"pipeline", "pipeline.cli", "pipeline.train"}  # the package names what it offers
    used = {n.split(".")[1] for n in IMPORTS["pipeline.simulate"] if n.startswith("pipeline.")}
    assert used <= {"convert", "workers", "catalog", "store", "address"}


def test_the_accessor_knows_metrics_and_no_store() -> None:
    used = {n.split(".")[1] for n in IMPORTS["pipeline.accessor"] if n.startswith("pipeline.")}
    assert used == {"workers"}
    assert not [m for m in IMPORTS if "pipeline.accessor" in IMPORTS[m]]


def test_readers_know_the_catalog_and_not_the_reverse() -> None:
    assert list(offenders("pipeline.readers", "pipeline.catalog"))
    assert not list(offenders("pipeline.catalog", "pipeline.readers"))


def test_metrics_are_reached_through_distances_and_cluster() -> None:
    """Other stages know data, not metrics."""
    stages = ("pipeline.convert", "pipeline.correlate", "pipeline.report", "pipeline.readers")
    assert not list(offenders((*stages, "pipeline.store", "pipeline.schema"), "lsim"))


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_import_nothing_of_the_project(leaf: str) -> None:
    assert leaf in IMPORTS
    assert not list(offenders(leaf, *PACKAGES))


def test_no_module_imports_tests_or_benchmarks() -> None:
    assert not list(offenders(PACKAGES, "tests", "benchmarks", "pytest", "hypothesis", "skimage"))
