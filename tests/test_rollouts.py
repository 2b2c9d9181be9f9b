"""Models against their reference: matching, scopes, protocols, resume, ranking."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
import yaml
from commands import run_lsim
from matrices import smooth_sequence, write_archive

import lsim
from pipeline.comparison import Layout, compare_files
from pipeline.report import DamagedReportError, write_rollouts_report
from pipeline.rollouts import RolloutSettings, compare
from pipeline.rollouts.intervals import Bootstrap
from pipeline.rollouts.ranking import rank
from pipeline.storage import store
from pipeline.storage.checked_frames import content_hash
from pipeline.verify import verify
from pipeline.verify.repair import repair
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile

KEY = "A/density"
SIZE = 24
PIXELS = RolloutSettings(metrics=("l2", "vrmse"))


@pytest.fixture
def here():
    """This process."""
    with Cluster(Profile(kind="none")) as cluster:
        yield cluster


def trajectories(
    count: int = 3, frames: int = 6, channels: int = 1, size: int = SIZE
) -> dict[str, np.ndarray]:
    return {f"s{k}": smooth_sequence(k, frames, size, channels) for k in range(count)}


def perturbed(sequences: dict[str, np.ndarray], noise: float, seed: int = 0) -> dict[str, np.ndarray]:
    """A model: errors that grow with time."""
    rng = np.random.default_rng(seed)
    return {
        name: (frames + noise * rng.standard_normal(frames.shape).cumsum(axis=0)).astype(np.float32)
        for name, frames in sequences.items()
    }


def members(sequences: dict[str, np.ndarray], count: int, noise: float) -> dict[str, np.ndarray]:
    return {
        f"run{k}/{name}": frames
        for k in range(count)
        for name, frames in perturbed(sequences, noise, k).items()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a reference and two models, of which each test has a copy."""
    folder, reference = tmp_path_factory.mktemp("written"), trajectories()
    write_archive(folder / "reference.zarr", {KEY: reference})
    write_archive(folder / "unet.zarr", {KEY: members(reference, 2, 0.02)})
    write_archive(folder / "fno.zarr", {KEY: perturbed(reference, 0.05, 9)})
    return folder


@pytest.fixture
def stores(tmp_path: Path, written: Path) -> dict[str, Path]:
    return {
        name: shutil.copytree(written / f"{name}.zarr", tmp_path / f"{name}.zarr")
        for name in ("reference", "unet", "fno")
    }


def results_of(path: Path, key: str = KEY) -> xr.Dataset:
    return store.open_dataset(path, key).load()


def values_of(path: Path, metric: str, model: str, member: str = "", key: str = KEY) -> np.ndarray:
    """Distances (sequence, frame) of a member."""
    dataset = results_of(path, key)
    place = list(dataset["model"].values).index(model)
    names = list(dataset["member"].values[place])
    return dataset[metric].values[place, names.index(member)]


def test_each_rollout_is_compared_with_its_trajectory_the_reference_first(tmp_path, stores, here):
    reference = trajectories()
    report = compare(
        stores["reference"],
        {"unet": stores["unet"], "fno": stores["fno"]},
        tmp_path / "r.zarr",
        PIXELS,
        cluster=here,
    )
    assert (report.computed, report.failures, report.unmatched) == (2 * 3 * 3, [], [])
    dataset = results_of(tmp_path / "r.zarr")
    assert dataset["vrmse"].dims == ("model", "member", "sequence", "frame")
    assert dataset["vrmse"].shape == (2, 2, 3, 6)
    assert dataset["member"].values.tolist() == [["run0", "run1"], ["", ""]]
    assert np.isnan(values_of(tmp_path / "r.zarr", "l2", "fno")).sum() == 0
    assert np.isnan(dataset["l2"].values[1, 1]).all(), "a model of one member has no second"
    metric = lsim.load_metric("vrmse", size=None)
    for member in ("run0", "run1"):
        frames = members(reference, 2, 0.02)
        got = values_of(tmp_path / "r.zarr", "vrmse", "unet", member)
        for row, name in enumerate(reference):
            first, second = reference[name], frames[f"{member}/{name}"]
            np.testing.assert_allclose(got[row], metric.distance(first, second, scope="none"), rtol=1e-9)
            assert not np.allclose(got[row][1:], metric.distance(second, first, scope="none")[1:], rtol=1e-4)


@pytest.mark.parametrize("scope", ["reference", "each", "pair", "dataset", (-2.0, 3.0)])
def test_scopes_normalise_by_their_frames(tmp_path, stores, here, scope: Any):
    settings = RolloutSettings(metrics=("l1", "ssim"), scope=scope)
    compare(stores["reference"], {"fno": stores["fno"]}, tmp_path / "r.zarr", settings, cluster=here)
    reference, model = trajectories(), perturbed(trajectories(), 0.05, 9)
    everything = np.stack(list(reference.values())).astype(np.float64)
    for name in ("l1", "ssim"):
        metric = lsim.load_metric(name, size=None)
        got = values_of(tmp_path / "r.zarr", name, "fno")
        for row, sequence in enumerate(reference):
            first, second = reference[sequence].astype(np.float64), model[sequence].astype(np.float64)
            if scope == "pair":
                expected = metric.distance(first, second, scope="pair")
            else:
                lo, hi = {
                    "reference": (first.min(), first.max()),
                    "each": (first.min(), first.max()),
                    "dataset": (everything.min(), everything.max()),
                }.get(scope, scope)
                own = (second.min(), second.max()) if scope == "each" else (lo, hi)
                first = (first - lo) / (hi - lo)
                second = (second - own[0]) / (own[1] - own[0])
                expected = metric.distance(first, second, scope=(0.0, 1.0))
            np.testing.assert_allclose(got[row], expected, rtol=2e-4, atol=1e-6)


def write_files(folder: Path) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """The files of an evaluation: (run, sample, sequence, time, channel, y, x) beside a reference."""
    rng = np.random.default_rng(1)
    reference = np.stack(list(trajectories(2, 5, 2, 48).values())).transpose(0, 1, 4, 2, 3)
    models = {
        name: (reference + noise * rng.standard_normal((2, 3, *reference.shape)).cumsum(3)).astype("f4")
        for name, noise in (("unet", 0.02), ("fno", 0.1))
    }
    models["fno"][1, 2, 0, 3:] = np.nan  # it blew up
    mask = np.ones((48, 48), np.uint8)
    mask[5:12, 8:15] = 0
    np.savez(folder / "reference.npz", full=reference)
    np.save(folder / "unet.npy", models["unet"])
    torch.save({"prediction": torch.from_numpy(models["fno"])}, folder / "fno.pt")
    np.save(folder / "mask.npy", mask)
    return reference, models, mask


LAYOUT: dict[str, Any] = {
    "dataset": "tra",
    "options": {"channels": {"velocity": 0, "pressure": 1}, "mask": {"file": "mask.npy"}},
}


def test_the_protocol_of_surrogates_is_that_of_its_paper(tmp_path, here):
    """Recomputed by hand: raw mean squares; networks on each trajectory's own range, channel by channel."""
    reference, models, mask = write_files(tmp_path)
    (tmp_path / "layout.yaml").write_text(yaml.safe_dump(LAYOUT))
    code, text = run_lsim(
        "compare",
        tmp_path / "reference.npz",
        f"unet={tmp_path / 'unet.npy'}",
        f"fno={tmp_path / 'fno.pt'}",
        *("--metrics", "l2,lsim-open", "--protocol", "acdm", "--layout", tmp_path / "layout.yaml"),
        *("--out", tmp_path / "r.zarr", "--cluster", "none"),
    )
    assert code == 3, text
    assert "tra/velocity fno run1-sample2 00000, l2, lsim-open: 2 of 5 pairs of frames have NaN" in text
    code, text = run_lsim("rank", tmp_path / "r.zarr", "--out", tmp_path / "results", "--replicates", "200")
    assert code == 0, text
    network = lsim.load_metric("lsim-open", size=None)
    first = reference.astype(np.float64) * mask
    for model, frames in models.items():
        second = frames.astype(np.float64) * mask
        scalars: dict[str, list[float]] = {"l2": [], "lsim-open": []}
        for run, sample, sequence in np.ndindex(2, 3, 2):
            ours, theirs = first[sequence], second[run, sample, sequence]
            if not np.isfinite(theirs).all():
                continue
            squares = ((ours - theirs) ** 2).mean(axis=(2, 3))
            learned = np.stack(
                [
                    network(*(three_channels(side[:, channel]) for side in (ours, theirs)))
                    for channel in (0, 1)
                ]
            )
            scalars["l2"].append(squares.mean())
            scalars["lsim-open"].append(learned.mean())
        errors = pd.read_parquet(tmp_path / "results" / "errors.parquet")
        for metric, expected in scalars.items():
            (row,) = errors[
                (errors["model"] == model)
                & (errors["metric"] == metric)
                & (errors["field"] == "all")
                & (errors["frame"] == -1)
            ].to_dict("records")
            np.testing.assert_allclose(row["value"], np.mean(expected), rtol=2e-5)
            np.testing.assert_allclose(row["std"], np.std(expected, ddof=1), rtol=1e-3)
            assert (row["rollouts"], row["incomplete"]) == ((12, 0) if model == "unet" else (11, 1))


def test_a_workflow_of_models_runs_all_stages_and_again_nothing(tmp_path):
    write_files(tmp_path)
    workflow: dict[str, Any] = {
        "reference": "reference.npz",
        "models": {"unet": "unet.npy", "fno": ["fno.pt"]},
        "out": str(tmp_path / "out"),
        "layout": LAYOUT,
        "rollouts": {"metrics": ["l2", "ssim"], "baselines": ["persistence"]},
    }
    (tmp_path / "models.yaml").write_text(yaml.safe_dump(workflow))
    code, text = run_lsim("run", tmp_path / "models.yaml", "--cluster", "none")
    assert code == 3, text
    assert (tmp_path / "out" / "results" / "errors.parquet").exists()
    code, text = run_lsim("run", tmp_path / "models.yaml", "--cluster", "none")
    assert "rollouts compared" not in text, text
    code, text = run_lsim("run", tmp_path / "models.yaml", "--metrics", "l1")
    assert code == 2, text
    assert "section rollouts" in text


def three_channels(frames: np.ndarray) -> torch.Tensor:
    scaled = (frames - frames.min()) / (frames.max() - frames.min()) * 255
    return torch.from_numpy(scaled.astype(np.float32))[:, None].repeat(1, 3, 1, 1)


def file_of(path: Path, sequences: dict[str, np.ndarray]) -> Path:
    np.save(path, np.stack(list(sequences.values())).transpose(0, 1, 4, 2, 3))
    return path


def compare_times(tmp_path: Path, cluster: Cluster, frames: slice, time: Any) -> Any:
    reference = trajectories(2, 8)
    file_of(tmp_path / "reference.npy", reference)
    file_of(tmp_path / "model.npy", {name: values[frames] for name, values in reference.items()})
    layout = Layout(options={"channels": {"u": 0}}, models={"time": time})
    return compare_files(
        str(tmp_path / "reference.npy"),
        {"m": str(tmp_path / "model.npy")},
        tmp_path / "r.zarr",
        RolloutSettings(metrics=("l2",)),
        cluster,
        layout=layout,
        progress=quietly,
    ).rollouts


def quietly(stage: str) -> Any:
    return contextlib.nullcontext(lambda done, total: None)


def test_frames_are_matched_by_time_and_those_without_partner_are_counted(tmp_path, here):
    report = compare_times(tmp_path, here, slice(1, 6, 2), [1.0, 3.0, 5.0])
    values = values_of(tmp_path / "r.zarr", "l2", "m", key="data/u")
    assert (values[:, [1, 3, 5]] == 0).all(), "its frames are the reference's own, at their times"
    assert np.isnan(values[:, [0, 2, 4, 6, 7]]).all()
    reasons = {failure.metric: failure.reason for failure in report.failures}
    assert reasons == {
        "l2": "5 of 8 frames have no partner at their time",
        "energy": "3 of 4 frames are missing, or have NaN or infinity",
    }


def test_files_in_the_form_of_the_well_and_netcdf_ensembles_are_read(tmp_path, here):
    """Groups as https://github.com/PolymathicAI/the_well, docs/data_format.md, lists them."""
    import h5py

    reference = np.stack(list(trajectories(2, 5).values()))[..., 0]
    with h5py.File(tmp_path / "reference.hdf5", "w") as file:
        file["t0_fields/pressure"] = reference.swapaxes(2, 3)
        file["dimensions/time"] = np.arange(5) * 0.25
        file["dimensions/x"] = np.arange(SIZE, dtype=np.float32)
    with h5py.File(tmp_path / "model.hdf5", "w") as file:
        file["t0_fields/pressure"] = reference.swapaxes(2, 3)[:, 1:4] + 1
        file["dimensions/time"] = np.arange(1, 4) * 0.25
    arrays = {"pressure": "t0_fields/pressure"}
    dims = ["sequence", "time", "x", "y"]
    layout = Layout(reader="arrays", options={"arrays": arrays, "dims": dims, "time": "dimensions/time"})
    compare_paths(tmp_path, "hdf5", here, layout)
    values = values_of(tmp_path / "r.zarr", "l2", "m", key="data/pressure")
    np.testing.assert_allclose(values[:, 1:4], 1, rtol=1e-6)
    assert np.isnan(values[:, [0, 4]]).all()

    for name, part, offset in (("reference", slice(None), 0), ("model", slice(1, 4), 1)):
        dataset = xr.Dataset(
            {"t850": (("member", "time", "latitude", "longitude"), reference[:, part] + offset)},
            coords={"time": np.arange(5)[part] * 6.0, "member": ["a", "b"]},
        )
        dataset.to_netcdf(tmp_path / f"{name}.nc")
    names = {"sequence": "member", "frame": "time", "y": "latitude", "x": "longitude"}
    compare_paths(tmp_path, "nc", here, Layout(options={"dims": names, "parameter": "time"}, dataset="era5"))
    values = values_of(tmp_path / "r.zarr", "l2", "m", key="era5/t850")
    np.testing.assert_allclose(values[:, 1:4], 1, rtol=1e-6)


def compare_paths(tmp_path: Path, ending: str, cluster: Cluster, layout: Layout) -> Any:
    shutil.rmtree(tmp_path / "r.zarr", ignore_errors=True)
    shutil.rmtree(tmp_path / "r-frames", ignore_errors=True)
    return compare_files(
        str(tmp_path / f"reference.{ending}"),
        {"m": str(tmp_path / f"model.{ending}")},
        tmp_path / "r.zarr",
        RolloutSettings(metrics=("l2",)),
        cluster,
        layout=layout,
        progress=quietly,
    )


def test_a_model_at_other_times_is_named(tmp_path, here):
    report = compare_times(tmp_path, here, slice(None), {"start": 0.4, "step": 1.0})
    assert [entry.sequence for entry in report.unmatched] == ["00000", "00001"]
    assert all("no frame at a time of the reference" in entry.reason for entry in report.unmatched)


def test_what_has_no_partner_is_named_and_the_rest_goes_on(tmp_path, here):
    reference = trajectories()
    source = write_archive(tmp_path / "reference.zarr", {KEY: reference, "A/pressure": reference})
    other = {"s0": reference["s0"], "elsewhere": reference["s1"]}
    wide = {name: np.concatenate([frames, frames], axis=2) for name, frames in reference.items()}
    longer = {name: np.concatenate([frames, frames]) for name, frames in reference.items()}
    models = {
        "lacking": write_archive(tmp_path / "lacking.zarr", {KEY: other, "A/more": reference}),
        "wide": write_archive(tmp_path / "wide.zarr", {KEY: wide, "A/pressure": reference}),
        "longer": write_archive(tmp_path / "longer.zarr", {KEY: longer, "A/pressure": reference}),
    }
    report = compare(source, models, tmp_path / "r.zarr", PIXELS, cluster=here)
    reasons = {(entry.model, entry.field, entry.sequence): entry.reason for entry in report.unmatched}
    assert "no sequence 'elsewhere'" in reasons["lacking", "density", "elsewhere"]
    assert "no such field" in reasons["lacking", "pressure", ""]
    assert "no such field" in reasons["lacking", "more", ""]
    assert "one grid" in reasons["wide", "density", ""]
    assert "12 frames for 6" in reasons["longer", "density", "s0"]
    assert np.isfinite(values_of(tmp_path / "r.zarr", "l2", "lacking")[0]).all()
    assert np.isfinite(values_of(tmp_path / "r.zarr", "l2", "wide", key="A/pressure")).all()
    foreign = write_archive(tmp_path / "foreign.zarr", {"B/density": reference})
    with pytest.raises(store.StoreError, match="name data sets and fields alike"):
        compare(source, {"foreign": foreign}, tmp_path / "f.zarr", PIXELS, cluster=here)


def test_a_new_model_and_a_new_metric_cost_themselves_alone(tmp_path, stores, here):
    out = tmp_path / "r.zarr"
    first = compare(stores["reference"], {"unet": stores["unet"]}, out, PIXELS, cluster=here)
    again = compare(stores["reference"], {"unet": stores["unet"]}, out, PIXELS, cluster=here)
    assert (first.computed, again.computed, again.up_to_date, again.blocks) == (12, 0, 12, 0)
    before = values_of(out, "l2", "unet", "run1")
    more = compare(stores["reference"], {"fno": stores["fno"]}, out, PIXELS, cluster=here)
    assert (more.computed, more.up_to_date) == (6, 0)
    np.testing.assert_array_equal(values_of(out, "l2", "unet", "run1"), before)
    metrics = RolloutSettings(metrics=("l2", "vrmse", "l1"))
    both = {"unet": stores["unet"], "fno": stores["fno"]}
    report = compare(stores["reference"], both, out, metrics, cluster=here)
    assert (report.computed, report.up_to_date) == (9, 18)
    third = both | {"third": write_archive(tmp_path / "third.zarr", {KEY: trajectories()})}
    report = compare(stores["reference"], third, out, metrics, cluster=here)
    assert (report.computed, report.up_to_date) == (9, 27)
    changed = perturbed(trajectories(), 0.05, 9)
    changed["s1"] = changed["s1"] + 1
    write_archive(stores["fno"], {KEY: changed})
    report = compare(stores["reference"], both, out, metrics, cluster=here)
    assert (report.computed, report.up_to_date) == (3, 24)


def test_another_reference_makes_all_of_its_rollouts_stale(tmp_path, stores, here):
    out = tmp_path / "r.zarr"
    compare(stores["reference"], {"unet": stores["unet"], "fno": stores["fno"]}, out, PIXELS, cluster=here)
    changed = trajectories()
    changed["s2"] = changed["s2"] * 2
    write_archive(stores["reference"], {KEY: changed})
    report = compare(stores["reference"], {"unet": stores["unet"]}, out, PIXELS, cluster=here)
    assert (report.computed, report.up_to_date) == (4, 8)
    # Those of a model that this run doesn't name are out of date, and nobody takes them for today's.
    errors = rank(out, tmp_path / "results", replicates=50).errors
    assert set(errors.query("model == 'fno' and frame == -1").incomplete) == {1}


def test_same_bytes_whatever_the_workers_and_after_an_interruption(tmp_path, stores, here, two_workers):
    models = {"unet": stores["unet"], "fno": stores["fno"]}
    settings = RolloutSettings(metrics=("l2", "ssim"), baselines=("persistence", "mean"))
    compare(stores["reference"], models, tmp_path / "one.zarr", settings, cluster=here)
    compare(stores["reference"], models, tmp_path / "two.zarr", settings, cluster=two_workers)

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(
            stores["reference"], models, tmp_path / "cut.zarr", settings, cluster=here, progress=interrupt
        )
    report = compare(stores["reference"], models, tmp_path / "cut.zarr", settings, cluster=here)
    assert report.computed > 0
    assert report.up_to_date > 0
    for key in (KEY, f"{KEY}/ensemble", f"{KEY}/spectra"):
        expected = results_of(tmp_path / "one.zarr", key)
        for name in ("two.zarr", "cut.zarr"):
            xr.testing.assert_identical(results_of(tmp_path / name, key), expected)


def test_long_trajectories_are_read_in_windows(tmp_path, stores, here, monkeypatch):
    models = {"unet": stores["unet"]}
    settings = RolloutSettings(metrics=("rmse", "ssim"), scope={"ssim": "each"})
    compare(stores["reference"], models, tmp_path / "whole.zarr", settings, cluster=here)
    monkeypatch.setattr("pipeline.rollouts.windows.WINDOW_BYTES", 2 * 8 * SIZE * SIZE)
    monkeypatch.setattr("pipeline.rollouts.windows.HELD_BYTES", 0)
    compare(stores["reference"], models, tmp_path / "windows.zarr", settings, cluster=here)
    for key in (KEY, f"{KEY}/ensemble", f"{KEY}/spectra"):
        results = [results_of(tmp_path / f"{name}.zarr", key) for name in ("windows", "whole")]
        xr.testing.assert_identical(*results)


def test_baselines_are_made_of_the_reference(tmp_path, stores, here):
    settings = RolloutSettings(metrics=("l2",), baselines=("persistence", "mean"))
    compare(stores["reference"], {"fno": stores["fno"]}, tmp_path / "r.zarr", settings, cluster=here)
    reference = np.stack(list(trajectories().values())).astype(np.float64)
    for model, frame in (("persistence", reference[:, :1]), ("mean", reference.mean(axis=(0, 1)))):
        expected = ((reference - frame) ** 2).mean(axis=(2, 3, 4))
        got = values_of(tmp_path / "r.zarr", "l2", model)
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-15)


def test_a_damaged_rollout_and_a_damaged_reference_are_named(tmp_path, stores, here):
    chunk = next(
        path for path in sorted((stores["fno"] / KEY / "frames" / "c" / "1").rglob("*")) if path.is_file()
    )
    chunk.write_bytes(chunk.read_bytes()[:-3] + b"xxx")
    models = {"unet": stores["unet"], "fno": stores["fno"]}
    report = compare(stores["reference"], models, tmp_path / "r.zarr", PIXELS, cluster=here)
    assert {(f.model, f.sequence) for f in report.failures} == {("fno", "s1")}
    assert all("damaged frames" in failure.reason for failure in report.failures)
    assert np.isfinite(values_of(tmp_path / "r.zarr", "l2", "fno")[[0, 2]]).all()
    write_archive(stores["fno"], {KEY: perturbed(trajectories(), 0.05, 9)})
    report = compare(stores["reference"], models, tmp_path / "r.zarr", PIXELS, cluster=here)
    assert (report.computed, report.failures) == (2, [])


def test_distances_that_were_exchanged_are_left_out_and_computed_again(tmp_path, stores, here):
    out = tmp_path / "r.zarr"
    models = {"unet": stores["unet"], "fno": stores["fno"]}
    compare(stores["reference"], models, out, PIXELS, cluster=here)
    expected = results_of(out)
    chunks = [out / KEY / "l2" / "c" / str(k) / "0" / "0" / "0" for k in range(2)]
    contents = [chunk.read_bytes() for chunk in chunks]
    for chunk, content in zip(chunks, reversed(contents), strict=True):
        chunk.write_bytes(content)
    report = rank(out, tmp_path / "results", replicates=50)
    assert len(report.damaged) == 2 * 3 + 3
    assert report.errors.query("metric == 'l2'")["value"].isna().all()
    assert compare(stores["reference"], models, out, PIXELS, cluster=here).computed == 9
    xr.testing.assert_identical(results_of(out), expected)


def test_each_damaged_chunk_is_found_and_mended(tmp_path, stores, here):
    out, one = tmp_path / "r.zarr", RolloutSettings(metrics=("l2",))
    compare(stores["reference"], {"fno": stores["fno"]}, out, one, cluster=here)
    assert verify(out).compared == 3 + 3 + 3, "distances, and spectra of the model and the reference"
    expected = results_of(out)
    chunks = sorted(p for p in (out / KEY).rglob("*") if p.is_file() and p.name != "zarr.json")
    names = [chunk.relative_to(out / KEY).as_posix() for chunk in chunks]
    assert any("l2" in name for name in names)
    for chunk, name in zip(chunks, names, strict=True):
        content = chunk.read_bytes()
        for damage in ("flipped", "deleted"):
            if damage == "flipped":
                chunk.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            elif chunk.exists():
                chunk.unlink()
            else:  # a chunk of nothing but empty texts, which need not be written again
                assert name.startswith(("member/", "spectra/member/"))
                continue
            report = verify(out)
            assert not report.whole, (name, damage)
            repair(out, report)
            compare(stores["reference"], {"fno": stores["fno"]}, out, one, cluster=here)
            xr.testing.assert_identical(results_of(out), expected)
    assert verify(out).whole


def test_distances_that_are_nothing_but_rounding_are_0(tmp_path, here):
    """Multiples of the reference differ by nothing for the correlation, and by much for others."""
    reference = trajectories(4)
    rng = np.random.default_rng(0)
    frames = {
        "reference": reference,
        "third": {name: of / 3 + np.float32(0.1) for name, of in reference.items()},
        "seventh": {name: of / 7 + np.float32(0.3) for name, of in reference.items()},
        "near": {
            name: (of + 1e-4 * rng.standard_normal(of.shape)).astype(np.float32)
            for name, of in reference.items()
        },
    }
    paths = {name: write_archive(tmp_path / f"{name}.zarr", {KEY: of}) for name, of in frames.items()}
    settings = RolloutSettings(metrics=("correlation", "l2"))
    out = tmp_path / "r.zarr"
    report = compare(paths.pop("reference"), paths, out, settings, cluster=here)
    assert (report.equal, report.failures) == (2 * 4, [])
    dataset = results_of(out).sel(model=["third", "seventh", "near"])
    assert (dataset["correlation"].values[:2] == 0).all()
    assert (dataset["correlation"].values[2] > 0).all(), "a small signal stays"
    assert (dataset["l2"].values > 0).all()
    ranking = rank(out, tmp_path / "results", replicates=200)
    best, equals = (of["A", "density", "correlation"] for of in (ranking.best, ranking.equals))
    assert {best, *equals} == {"third", "seventh"}


def test_a_page_without_its_stores_says_so(tmp_path, stores, here):
    out = tmp_path / "r.zarr"
    compare(stores["reference"], {"fno": stores["fno"]}, out, PIXELS, cluster=here)
    rank(out, tmp_path / "results", replicates=50)
    page = Path(write_rollouts_report(tmp_path / "results"))
    assert "Everything was compared" in page.read_text()
    assert page.read_text().count("data:image/png") == 3 * 4
    shutil.rmtree(stores["fno"])
    assert "No pictures: " in Path(write_rollouts_report(tmp_path / "results")).read_text()
    shutil.rmtree(out)
    html = Path(write_rollouts_report(tmp_path / "results")).read_text()
    assert "missing distances cannot be listed" in html
    assert "Everything was compared" not in html


def test_a_page_without_damaged_distances_is_written_and_ends_with_an_error(tmp_path, stores, here):
    out = tmp_path / "r.zarr"
    compare(stores["reference"], {"unet": stores["unet"], "fno": stores["fno"]}, out, PIXELS, cluster=here)
    (out / KEY / "l2" / "c" / "0" / "0" / "0" / "0").unlink()
    rank(out, tmp_path / "results", replicates=50)
    with pytest.raises(DamagedReportError, match="l2, unet run0 s0"):
        write_rollouts_report(tmp_path / "results")
    html = (tmp_path / "results" / "report" / "index.html").read_text()
    assert "A/density: l2, unet run0 s0" in html


def test_pictures_are_of_the_frames_that_were_compared(tmp_path, here):
    reference = trajectories(2, 6)
    source = write_archive(tmp_path / "reference.zarr", {KEY: reference})
    model = write_archive(tmp_path / "m.zarr", {KEY: reference})
    late = store.get_array(store.get_group(store.open_store(model, "a"), KEY), "parameter")
    times = store.read(late)
    times[:, 1:-1] += 0.05  # within the tolerance of this run, and beyond the default
    store.write_rows(late, 0, times)
    contents = store.get_array(store.get_group(store.open_store(model, "a"), KEY), "content")
    hashes = [content_hash(frames, row) for frames, row in zip(reference.values(), times, strict=True)]
    store.write_rows(contents, 0, np.array(hashes, object))
    settings = RolloutSettings(metrics=("l2",), tolerance=0.3)
    report = compare(source, {"m": model}, tmp_path / "r.zarr", settings, cluster=here)
    assert not report.failures
    rank(tmp_path / "r.zarr", tmp_path / "results", replicates=50)
    html = Path(write_rollouts_report(tmp_path / "results")).read_text()
    assert "no frame" not in html


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ("l2",), "scope": "sequence"}, "scope"),
        ({"metrics": ("ssim",), "protocol": "acdm"}, "protocol acdm has the metrics l2 and lsim"),
        ({"metrics": ("l2",), "scope": {"ssim": "each"}}, "none of the metrics"),
        ({"metrics": ("l2",), "scope": (2.0, 1.0)}, "LO below HI"),
        ({"metrics": ("l2",), "size": 32, "protocol": "acdm"}, "leave them out"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        RolloutSettings(**settings)


def test_scope_none_needs_a_metric_of_physical_values(tmp_path, stores, here):
    settings = RolloutSettings(metrics=("ssim",), scope="none")
    with pytest.raises(ValueError, match="scope 'none'"):
        compare(stores["reference"], {"fno": stores["fno"]}, tmp_path / "r.zarr", settings, cluster=here)
    assert not (tmp_path / "r.zarr").exists()


# ---------------------------------------------------------------- ranking


def test_the_best_model_and_its_equals(tmp_path, here):
    rng = np.random.default_rng(3)
    reference = {f"s{k}": smooth_sequence(k, 4, SIZE) for k in range(12)}
    noises = {"good": 0.05, "as-good": 0.05, "bad": 0.2}
    models = {
        name: {
            key: (frames + noise * rng.uniform(0.5, 1.5) * rng.standard_normal(frames.shape)).astype(
                np.float32
            )
            for key, frames in reference.items()
        }
        for name, noise in noises.items()
    }
    source = write_archive(tmp_path / "reference.zarr", {KEY: reference})
    paths = {name: write_archive(tmp_path / f"{name}.zarr", {KEY: of}) for name, of in models.items()}
    compare(source, paths, tmp_path / "r.zarr", RolloutSettings(metrics=("l2",)), cluster=here)
    report = rank(tmp_path / "r.zarr", tmp_path / "results", replicates=500)
    place = ("A", "density", "l2")
    assert {report.best[place], *report.equals[place]} == {"good", "as-good"}
    overall = report.errors.query("frame == -1").set_index("model")
    assert (overall.low < overall.value).all()
    assert (overall.value < overall.high).all()
    assert overall.loc["bad", "low"] > overall.loc["good", "high"]
    again = rank(tmp_path / "r.zarr", tmp_path / "again", replicates=500)
    pd.testing.assert_frame_equal(again.errors, report.errors)


def test_intervals_cover_as_often_as_they_say():
    """Means of 8 sequences and 3 members, drawn anew: 95 % of intervals hold the true mean, nearly."""
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        values = 1 + rng.standard_normal((1, 8)) + 0.3 * rng.standard_normal((3, 8))
        interval = Bootstrap({"m": values}, 400, seed).interval("m")
        covered += interval.low <= 1 <= interval.high
    assert 0.9 <= covered / 200 <= 0.99


def test_equal_models_are_seldom_told_apart():
    rng = np.random.default_rng(1)
    apart = 0
    for seed in range(100):
        sequences = rng.standard_normal((1, 10))
        values = {f"m{k}": sequences + rng.standard_normal((2, 10)) for k in range(6)}
        apart += any(pair.is_certain for pair in Bootstrap(values, 300, seed).differences())
    assert apart <= 12


def test_valid_times_are_censored_where_a_rollout_stays_valid(tmp_path, here):
    reference = trajectories(3, 6)
    drifting = {name: frames.copy() for name, frames in reference.items()}
    for frames in drifting.values():
        frames[3:] = np.random.default_rng(0).standard_normal(frames[3:].shape)
    source = write_archive(tmp_path / "reference.zarr", {KEY: reference})
    models = {
        "exact": write_archive(tmp_path / "exact.zarr", {KEY: reference}),
        "drifting": write_archive(tmp_path / "drifting.zarr", {KEY: drifting}),
    }
    settings = RolloutSettings(metrics=("correlation",))
    compare(source, models, tmp_path / "r.zarr", settings, cluster=here)
    valid = rank(tmp_path / "r.zarr", tmp_path / "results", replicates=50).valid_times.set_index("model")
    assert (valid.loc["exact", "value"], valid.loc["exact", "censored"]) == (1.0, 3)
    assert valid.loc["drifting", "value"] == pytest.approx(0.6)
    assert valid.loc["drifting", "censored"] == 0


# ---------------------------------------------------------------- models that blow up, and second runs


def compared(tmp_path: Path, reference: dict, models: dict, cluster: Cluster, **settings: Any) -> Path:
    """Compare models, each by its sequences, in ``r.zarr``."""
    source = write_archive(tmp_path / "reference.zarr", {KEY: reference})
    paths = {name: write_archive(tmp_path / f"{name}.zarr", {KEY: of}) for name, of in models.items()}
    compare(source, paths, tmp_path / "r.zarr", RolloutSettings(**settings), cluster=cluster)
    return tmp_path / "r.zarr"


@pytest.mark.parametrize("amplitude", [1e3, 1e8, 1e14])
def test_a_model_that_diverges_is_not_equal_to_the_reference(tmp_path, here, amplitude: float):
    """However large the rounding of its own values is."""
    reference = trajectories(2)
    noise = np.random.default_rng(0).standard_normal((6, SIZE, SIZE, 1))
    wild = {name: (of + amplitude * noise).astype(np.float32) for name, of in reference.items()}
    metrics = ("correlation", "gradient", "fft", "l1")
    out = compared(tmp_path, reference, {"wild": wild}, here, metrics=metrics, scope="reference")
    dataset = results_of(out)
    for name in metrics:
        assert (dataset[name].values > 0).all(), name


def test_results_that_are_made_of_other_frames_are_forgotten_whatever_a_run_asks_for(tmp_path, here):
    reference = trajectories()
    old, new = members(reference, 2, 0.02), members(reference, 2, 0.5)
    out = compared(tmp_path, reference, {"m": old}, here, metrics=("l2", "vrmse"), baselines=("mean",))
    before = results_of(out, f"{KEY}/ensemble")["crps"].values[0]
    assert np.isfinite(before).all()
    compared(tmp_path, reference, {"m": new}, here, metrics=("l2",), ensembles=False, spectra=0)
    dataset = results_of(out).sel(model="m")
    assert np.isfinite(dataset["l2"].values).all()
    assert np.isnan(dataset["vrmse"].values).all(), "of the old frames"
    for part, name in (("ensemble", "crps"), ("spectra", "energy")):
        assert np.isnan(results_of(out, f"{KEY}/{part}")[name].sel(model="m").values).all()
    assert np.isfinite(results_of(out).sel(model="mean")["vrmse"].values[0]).all(), "it is as it was"
    changed = reference | {"s1": reference["s1"] + 1}
    compared(tmp_path, changed, {"m": new}, here, metrics=("l2",), ensembles=False, spectra=0)
    assert np.isnan(results_of(out).sel(model="mean")["vrmse"].values[0]).all(), "the mean is another"


def test_the_best_model_is_chosen_on_sequences_that_all_have(tmp_path, here):
    """One that blew up in the hardest sequence is not better for it."""
    rng = np.random.default_rng(0)
    reference = trajectories(6, 4)
    hard = {name: 20.0 if name == "s5" else 1.0 for name in reference}

    def model(noise: float) -> dict[str, np.ndarray]:
        return {
            name: (of + noise * hard[name] * rng.standard_normal(of.shape)).astype(np.float32)
            for name, of in reference.items()
        }

    better, worse = model(0.1), model(0.12)
    worse["s5"][2:] = np.nan
    out = compared(tmp_path, reference, {"better": better, "worse": worse}, here, metrics=("rmse",))
    ranking = rank(out, tmp_path / "results", replicates=500)
    errors = ranking.errors.query("frame == -1 and metric == 'rmse'").set_index("model")["value"]
    assert errors["worse"] < errors["better"], "a mean over fewer sequences"
    assert ranking.best["A", "density", "rmse"] == "better"
    page = Path(write_rollouts_report(tmp_path / "results")).read_text()
    assert "By rmse, better" in page


def test_equal_models_cannot_be_told_apart(tmp_path, here):
    reference = trajectories(5)
    model = perturbed(reference, 0.1)
    out = compared(tmp_path, reference, {"a": model, "b": model}, here, metrics=("l2",))
    rank(out, tmp_path / "results", replicates=200)
    page = Path(write_rollouts_report(tmp_path / "results")).read_text()
    assert "By l2, a has the least error, but it cannot be told apart from b" in page


@pytest.mark.parametrize("replicates", [0, 50])
def test_a_page_is_written_where_one_model_alone_has_complete_rollouts(tmp_path, here, replicates: int):
    reference = trajectories(2)
    gone = {
        name: np.where(np.arange(6)[:, None, None, None] > 3, np.nan, of) for name, of in reference.items()
    }
    out = compared(tmp_path, reference, {"a": reference, "gone": gone}, here, metrics=("l2",))
    rank(out, tmp_path / "results", replicates=replicates)
    assert "By l2, a " in Path(write_rollouts_report(tmp_path / "results")).read_text()


@pytest.mark.parametrize("scope", ["reference", "each"])
def test_ranges_of_trajectories_with_masked_pixels_are_those_of_their_values(tmp_path, here, scope: Any):
    reference = trajectories(2)
    land = np.arange(SIZE)[None, :, None, None] < 5
    models = {"m": perturbed(reference, 0.3)}
    masked = [
        {name: np.where(land, np.nan, of).astype("f4") for name, of in side.items()}
        for side in (reference, models["m"])
    ]
    out = compared(
        tmp_path,
        masked[0],
        {"m": masked[1]},
        here,
        metrics=("l1",),
        scope=scope,
        mask="nan",
        baselines=("mean",),
    )
    whole = tmp_path / "whole"
    whole.mkdir()
    cut = [{name: of[:, 5:] for name, of in side.items()} for side in (reference, models["m"])]
    expected = compared(whole, cut[0], {"m": cut[1]}, here, metrics=("l1",), scope=scope, baselines=("mean",))
    np.testing.assert_allclose(results_of(out)["l1"].values, results_of(expected)["l1"].values, rtol=1e-5)


OWN = """
import torch
from lsim.metric import Embedding, Metric, MetricInfo

class Mean(Metric):
    info = MetricInfo(title="difference of means", source="example")

    def embed(self, frames):
        return Embedding({"mean": frames.mean((1, 2, 3)).double()})

    def compare(self, a, b):
        return (a.parts["mean"][:, None] - b.parts["mean"]).abs()

class Exits(Mean):
    def paired(self, a, b):
        raise SystemExit(0)

class Interrupts(Mean):
    def paired(self, a, b):
        raise KeyboardInterrupt

class Writes(Mean):
    def paired(self, a, b):
        a.parts["mean"].zero_()
        return (a.parts["mean"] - b.parts["mean"]).abs()
"""


def test_metrics_of_others_fail_alone_and_by_name(tmp_path, stores, here, monkeypatch):
    (tmp_path / "own_rollout_metrics.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    names = [f"own_rollout_metrics:{kind}" for kind in ("Exits", "Interrupts", "Writes", "Mean")]
    settings = RolloutSettings(metrics=("l2", *names))
    report = compare(stores["reference"], {"fno": stores["fno"]}, tmp_path / "r.zarr", settings, cluster=here)
    failed = {failure.metric: failure.reason for failure in report.failures}
    dataset = results_of(tmp_path / "r.zarr")
    whole = {name for name in ("l2", *names) if name in dataset and np.isfinite(dataset[name].values).all()}
    assert len(failed) == 3
    assert all("paired" in reason for reason in failed.values()), failed
    assert "l2" in whole
    assert not whole & failed.keys()
