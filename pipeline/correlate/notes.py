"""Write notes on how the distances of a store were computed, for readers of the tables."""

from __future__ import annotations

from pipeline.correlate.archive import Archive
from pipeline.metrics.resolution import list_unresolved
from pipeline.storage import store


def list_notes(path: str, archive: Archive) -> list[str]:
    """List what makes the metrics of a store hard to compare, or their distances uncertain."""
    return [
        *_note_unlike_settings(path),
        *_note_variants(path),
        *_note_rounding(path, archive),
    ]


def _note_unlike_settings(path: str) -> list[str]:
    """Name each setting that differs between metrics."""
    metrics_by_setting: dict[str, dict[str, list[str]]] = {}
    for metric, specification in store.specifications(path):
        scope = specification.get("scope")
        # Ranges of a data set differ from field to field, and are meant to.
        preprocessing = specification.get("preprocessing", {})
        settings = {"scope": "fixed" if isinstance(scope, list) else scope}
        masked = {"mask": "nan" if preprocessing.get("mask") else "none"}
        weights = {"weights of pixels": "the field's" if "weights_of_pixels" in specification else "none"}
        for name, value in (settings | preprocessing | masked | weights).items():
            metrics = metrics_by_setting.setdefault(name, {}).setdefault(str(value), [])
            metrics += [metric] if metric not in metrics else []
    return [
        f"Not all metrics were computed with the same {name}: "
        + "; ".join(f"{value} for {', '.join(metrics)}" for value, metrics in by_value.items())
        for name, by_value in metrics_by_setting.items()
        if len(by_value) > 1
    ]


def _note_variants(path: str) -> list[str]:
    """Name the metrics that are not symmetric, with the directions that count, and those with weights."""
    texts = {
        "symmetrised": "Metrics that are not symmetric are taken as half of d(a, b) + d(b, a)",
        "directed": "Of metrics that are not symmetric the earlier frame of a pair is the reference",
        "weights_of_pixels": "Means over pixels are weighted by the weights of the field's pixels",
    }
    notes = []
    for key, text in texts.items():
        metrics = [name for name, specification in store.specifications(path) if specification.get(key)]
        if metrics:
            notes.append(f"{text}: {', '.join(dict.fromkeys(metrics))}")
    return notes


def _note_rounding(path: str, archive: Archive) -> list[str]:
    """Name metrics with distances that rounding may have changed, and fields that don't record it."""
    notes = [str(unresolved) for unresolved in list_unresolved(store.open_store(path))]
    unrecorded = [f"{field.dataset}/{field.field}" for field in archive.fields if not field.resolutions]
    if unrecorded:
        notes.append(
            "What rounding did to the distances is not recorded, so sequences of nothing else may count: "
            + ", ".join(unrecorded)
        )
    return notes
