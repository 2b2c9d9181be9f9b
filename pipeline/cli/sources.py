"""List, download, check and convert source data."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from pipeline.cli.display import (
    add_row,
    announce,
    output,
    show_quarantined,
    stage,
)
from pipeline.cli.options import (
    ClusterOption,
    DataDir,
    Names,
    VerifySources,
    Workers,
    exit_unless,
)


def convert(
    catalog: Annotated[
        str, typer.Argument(help="Catalog of source data: a YAML file, or the name of a shipped one.")
    ],
    out: Annotated[str, typer.Option(help="Store to create or update; a path or an s3:// or gs:// address.")],
    dataset: Names = None,
    data_dir: DataDir = None,
    verify_sources: VerifySources = False,
    cluster: ClusterOption = "local",
    workers: Workers = None,
) -> None:
    """Convert source files to frames.zarr, where they are new or have changed."""
    from pipeline.convert import convert
    from pipeline.sources.catalog import open_catalog
    from pipeline.workers.cluster import Cluster
    from pipeline.workers.profiles import load_profile

    with Cluster(load_profile(cluster, workers)) as pool, stage(pool)("convert") as show:
        report = convert(
            open_catalog(catalog),
            out,
            datasets=dataset,
            data_dir=data_dir,
            cluster=pool,
            progress=show,
            verify_sources=verify_sources,
        )
    if report.converted or report.removed:
        rate = report.bytes / 1e6 / max(report.seconds, 1e-9)
        output.print(
            f"{len(report.converted)} sequences converted, {len(report.unchanged)} unchanged, "
            f"{len(report.removed)} removed in {report.seconds:.1f} s ({rate:.0f} MB/s)"
        )
    else:
        compared = ", compared with their decoded sources" if verify_sources else ""
        output.print(f"nothing to do: {len(report.unchanged)} sequences are up to date{compared}")
    show_quarantined(report.quarantined)
    exit_unless(not report.quarantined)


def list_catalogs() -> None:
    """List the shipped catalogs."""
    from pipeline.resources import shipped_names
    from pipeline.sources.catalog import open_catalog

    table = Table("catalog", "title", "data sets")
    for name in shipped_names("catalogs"):
        catalog = open_catalog(name)
        add_row(table, name, catalog.title, ", ".join(entry.name for entry in catalog.datasets))
    output.print(table)


def show_catalog(
    catalog: Annotated[str, typer.Argument(help="Catalog: a YAML file, or the name of a shipped one.")],
    data_dir: DataDir = None,
) -> None:
    """Show a catalog's data sets, their readers, and the folders that hold their data."""
    from pipeline.sources.catalog import open_catalog
    from pipeline.sources.fetch import locate

    entries = open_catalog(catalog)
    output.print(entries.title or entries.name, style="bold", markup=False)
    for label, text in (("licence", entries.licence), ("doi", entries.doi), ("citation", entries.citation)):
        if text:
            output.print(f"{label}: {text}", markup=False)
    table = Table("data set", "title", "role", "reader", "folder")
    for entry in entries.datasets:
        folder = locate(entries, entry, data_dir)
        add_row(table, entry.name, entry.title, entry.role, entry.reader, str(folder) if folder else "absent")
    output.print(table)
    for pool, members in entries.pools.items():
        output.print(f"pool {pool}: {', '.join(members)}", markup=False)


def fetch_catalog(
    catalog: Annotated[str, typer.Argument(help="Catalog: a YAML file, or the name of a shipped one.")],
    dataset: Names = None,
    data_dir: DataDir = None,
) -> None:
    """Download or simulate the data of a catalog, and check its checksums."""
    from pipeline.sources.catalog import open_catalog
    from pipeline.sources.fetch import fetch

    for entry in fetch(open_catalog(catalog), dataset, data_dir, announce):
        output.print(f"{entry.dataset}: {entry.action} {entry.folder}", markup=False)


def verify_catalog(
    catalog: Annotated[str, typer.Argument(help="Catalog: a YAML file, or the name of a shipped one.")],
    dataset: Names = None,
    data_dir: DataDir = None,
) -> None:
    """Check that the data of a catalog is present and undamaged."""
    from pipeline.sources.catalog import open_catalog
    from pipeline.sources.fetch import verify

    whole = True
    for entry in verify(open_catalog(catalog), dataset, data_dir):
        whole &= entry.ok
        state = "absent" if not entry.present else "present" if entry.ok else "damaged"
        output.print(f"{entry.dataset}: {state}, checksum {entry.checksum}: {entry.detail}", markup=False)
    raise typer.Exit(0 if whole else 1)
