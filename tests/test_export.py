"""Exported metrics compute what the metric does, and are not left where they don't."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import lsim
from lsim.export import ExportError, export_metric
from lsim.export import agreement as agreement_module
from lsim.export.agreement import Distance, Embed, cases, compare
from lsim.metrics.learned import LSiM
from lsim.networks import LsimTrunk, SkipTrunk
from lsim.preprocess import FramesError
from lsim.testing import write_random_checkpoint
from lsim.weights import read_metadata
from pipeline.cli import main

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

TRUNKS = {"lsim": LsimTrunk, "lsim-skip": SkipTrunk}
pytestmark = pytest.mark.filterwarnings("ignore::lsim.SizeWarning")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights by metric, with maps of other sizes than any frames here have."""
    folder = tmp_path_factory.mktemp("weights")
    return {
        name: write_random_checkpoint(folder / f"{name}.pth", trunk, size=144)
        for name, trunk in TRUNKS.items()
    }


@pytest.fixture(scope="module")
def plume() -> np.ndarray:
    """A smooth plume that rises, (n, y, x), in units of its own."""
    y, x = np.meshgrid(np.linspace(0, 1, 60), np.linspace(0, 1, 50), indexing="ij")
    frames = [
        np.exp(-(((x - 0.5) / 0.1) ** 2) - ((y - height) / 0.2) ** 2) for height in (0.2, 0.23, 0.3, 0.6)
    ]
    return 1e-3 * np.stack(frames)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, Path], plume: np.ndarray) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    for name, path in weights.items():
        exported = export_metric(name, "onnx", folder, weights=path, frames={"plume": plume})
        assert [p.name for p in exported.paths] == [f"{name}.distance.onnx", f"{name}.embedding.onnx"]
    return folder


@pytest.fixture(params=list(TRUNKS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def metric(name: str, weights: dict[str, Path]) -> LSiM:
    metric = lsim.load_metric(name, weights[name], device="cpu", size=None)
    assert isinstance(metric, LSiM)
    return metric


class Read:
    """The two functions as onnxruntime has them."""

    def __init__(self, folder: Path, name: str) -> None:
        self.embedding_session = onnxruntime.InferenceSession(folder / f"{name}.embedding.onnx")
        self.distance_session = onnxruntime.InferenceSession(folder / f"{name}.distance.onnx")

    def embed(self, frames: np.ndarray) -> np.ndarray:
        (embedding,) = self.embedding_session.run(None, {"frames": frames})
        return embedding

    def distance(self, reference: np.ndarray, other: np.ndarray) -> np.ndarray:
        (distance,) = self.distance_session.run(None, {"reference": reference, "other": other})
        return distance


@pytest.fixture
def read(folder: Path, name: str) -> Read:
    return Read(folder, name)


def random_frames(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (255 * rng.random(shape)).astype(np.float32)


# --- onnx -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (4, 3, 160, 96), (2, 3, 224, 307), (1, 3, 49, 448)])
def test_onnx_gives_the_distances_and_embeddings_of_the_metric(
    read: Read, metric: LSiM, rng: np.random.Generator, shape: tuple[int, ...]
) -> None:
    """At sizes and batches that weren't among those compared at export."""
    a, b = (random_frames(rng, *shape) for _ in range(2))
    with torch.no_grad():
        expected = metric(torch.from_numpy(a), torch.from_numpy(b)).numpy()
        embedding = metric.embed(torch.from_numpy(a).permute(0, 2, 3, 1)).parts["features"].numpy()
    np.testing.assert_allclose(read.distance(a, b), expected, rtol=1e-5)
    z = read.embed(a)
    np.testing.assert_allclose(z, embedding, rtol=1e-4, atol=1e-5 * embedding.max())
    np.testing.assert_allclose(np.linalg.norm(z - read.embed(b), axis=1), expected, rtol=1e-5)


def test_onnx_on_preprocessed_frames_gives_what_distance_does(
    read: Read, metric: LSiM, weights: dict[str, Path], name: str, plume: np.ndarray
) -> None:
    """Preprocessing is all that stays outside."""
    frames = lsim.preprocess(plume, size=128).transpose(0, 3, 1, 2)
    expected = lsim.load_metric(name, weights[name], device="cpu", size=128).pairwise(plume)
    np.testing.assert_allclose(read.distance(frames[:1], frames[1:]), expected[0, 1:], rtol=1e-5)
    z = read.embed(frames)
    np.testing.assert_allclose(np.linalg.norm(z[:, None] - z, axis=-1), expected, rtol=1e-5, atol=1e-9)


def test_onnx_takes_one_reference_for_many_and_no_other_mixture(read: Read, rng: np.random.Generator) -> None:
    frames = random_frames(rng, 4, 3, 64, 64)
    one_by_one = [read.distance(frames[:1], frame[None])[0] for frame in frames[1:]]
    np.testing.assert_allclose(read.distance(frames[:1], frames[1:]), one_by_one, rtol=1e-6)
    np.testing.assert_allclose(read.distance(frames[1:], frames[:1]), one_by_one, rtol=1e-6)
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.Fail):
        read.distance(frames[:2], frames[1:])
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.Fail):
        read.distance(frames, frames[:, :, :48])


def test_onnx_equal_frames_have_distance_0_and_nan_stays_with_its_frame(
    read: Read, rng: np.random.Generator
) -> None:
    a, b = (random_frames(rng, 3, 3, 64, 64) for _ in range(2))
    assert read.distance(a, a).tolist() == [0, 0, 0]
    expected = read.distance(a, b)
    for value in (np.nan, np.inf, -np.inf):
        spoilt = a.copy()
        spoilt[1, 2, 40, 3] = value
        found = read.distance(spoilt, b)
        assert not np.isfinite(found[1])
        np.testing.assert_allclose(found[[0, 2]], expected[[0, 2]], rtol=1e-6)
        assert not np.isfinite(read.embed(spoilt)[1]).any()


@pytest.mark.smoke
def test_onnx_files_say_what_they_are_and_how_well_they_agree(
    folder: Path, name: str, metric: LSiM, tmp_path: Path
) -> None:
    for function in ("embedding", "distance"):
        path = folder / f"{name}.{function}.onnx"
        session = onnxruntime.InferenceSession(path)
        said = session.get_modelmeta().custom_metadata_map
        assert json.loads(said["specification"]) == metric.specification()
        agreement = json.loads(said["agreement"])
        assert 0 < agreement["distance"] <= agreement["tolerance"] == 1e-5
        assert 0 < agreement["embedding"] <= 1e-5
        assert {"plume 3×224×224", "random 3×224×224", "plume 3×131×195"} <= set(agreement["frames"])
        for given in session.get_inputs():
            assert [type(length) for length in given.shape] == [str, int, str, str]
            assert given.shape[1] == 3
        # Nothing of the machine that it was made on; weights could be any bytes, and are not looked at.
        model = onnx.load(path)
        del model.graph.initializer[:]
        content = model.SerializeToString()
        assert b"Conv" in content
        assert b".py" not in content
        assert str(Path(lsim.__file__).parents[1]).encode() not in content


# --- safetensors ------------------------------------------------------------------------------------------


def test_safetensors_loads_as_the_same_metric_and_keeps_its_history(
    tmp_path: Path, weights: dict[str, Path], plume: np.ndarray
) -> None:
    (first,) = export_metric("lsim", "safetensors", tmp_path / "a", weights=weights["lsim"], frames={}).paths
    assert first.name == "lsim.weights.safetensors"
    loaded = lsim.load_metric("lsim", first, device="cpu", size=128)
    expected = lsim.load_metric("lsim", weights["lsim"], device="cpu", size=128).pairwise(plume)
    assert np.array_equal(loaded.pairwise(plume), expected)
    agreement = json.loads(read_metadata(first)["agreement"])
    assert agreement["embedding"] == agreement["distance"] == 0

    (second,) = export_metric("another", "safetensors", tmp_path / "b", weights=first, frames={}).paths
    assert second.name == "another.weights.safetensors"
    was, now = read_metadata(first), read_metadata(second)
    assert (was["metric"], now["metric"]) == ("lsim", "another")
    assert {key: now[key] for key in ("trunk", "counts")} == {key: was[key] for key in ("trunk", "counts")}


# --- what does not agree ----------------------------------------------------------------------------------


def test_an_export_that_does_not_agree_is_an_error_and_leaves_the_folder_as_it_was(
    tmp_path: Path, weights: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = export_metric("lsim", "safetensors", tmp_path, weights=weights["lsim"], frames={}).paths
    before = path.read_bytes()
    save = lsim.export.save_checkpoint

    def spoilt(path, checkpoint, trunk, metadata):  # type: ignore[no-untyped-def]
        checkpoint.channel_weights[2][:] *= 1 + 1e-3
        return save(path, checkpoint, trunk, metadata)

    monkeypatch.setattr("lsim.export.save_checkpoint", spoilt)
    with pytest.raises(
        ExportError, match=r"differs from metric 'lsim' by \S+e-0\d relative, more than 1e-05"
    ):
        export_metric("lsim", "safetensors", tmp_path, weights=weights["lsim"], frames={})
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def in_torch(metric: LSiM) -> tuple[Embed, Distance]:
    """What an export would compute if nothing were lost."""

    def embed(frames: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return metric.embed(torch.from_numpy(frames)).parts["features"].numpy()

    def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.linalg.norm((embed(a) - embed(b)).astype(np.float64), axis=1)

    return embed, distance


@pytest.mark.parametrize(
    ("what", "spoil_embedding", "spoil_distance"),
    [
        ("embedding", lambda z: z * (1 + 3e-5), lambda d: d),
        ("embedding", lambda z: z[:, ::-1], lambda d: d),
        ("embedding", lambda z: z + np.float32("nan"), lambda d: d),
        ("embedding", lambda z: z[:, :-1], lambda d: d),
        ("distance", lambda z: z, lambda d: d * (1 - 3e-5)),
        ("distance", lambda z: z, lambda d: np.where(d == d.min(), np.nan, d)),
        ("distance", lambda z: z, lambda d: d[:, None]),
    ],
)
def test_whatever_differs_is_found(  # type: ignore[no-untyped-def]
    metric: LSiM, what: str, spoil_embedding, spoil_distance
) -> None:
    (case,) = cases(metric, ((64, 64),), {})[:1]
    embed, distance = in_torch(metric)
    found = compare(metric, [case], embed, distance, "this test")
    assert max(found.embedding, found.distance, found.distance_of_embeddings) < 1e-7
    with pytest.raises(ExportError, match=f"exported {what} of random 3×64×64 frames by this test"):
        compare(
            metric,
            [case],
            lambda frames: spoil_embedding(embed(frames)),
            lambda a, b: spoil_distance(distance(a, b)),
            "this test",
        )


def test_frames_compared_are_of_all_kinds_sizes_and_in_range(metric: LSiM, plume: np.ndarray) -> None:
    made = cases(metric, agreement_module.SIZES, {"plume": plume})
    assert len({case.reference.shape[1:3] for case in made}) == len(agreement_module.SIZES) + 1
    assert {case.kind for case in made} == {"random", "plume"}
    for case in made:
        metric.check_size(*case.reference.shape[1:3])
        for frames in (case.reference, case.other):
            assert frames.dtype == np.float32
            assert frames.shape == case.reference.shape
            assert 0 <= frames.min() < frames.max() <= 255


def test_equal_frames_have_to_come_out_at_0(metric: LSiM, plume: np.ndarray) -> None:
    embed, distance = in_torch(metric)
    compared = cases(metric, ((64, 64),), {"resting": plume[[0, 0, 0, 3]]})
    assert any(
        (case.reference[k] == case.other[k]).all() for case in compared for k in range(len(case.other))
    )
    found = compare(metric, compared, embed, distance, "this test")
    assert max(found.embedding, found.distance, found.distance_of_embeddings) < 1e-7
    with pytest.raises(ExportError, match=r"exported distance of resting .* by inf relative"):
        compare(metric, compared, embed, lambda a, b: np.maximum(distance(a, b), 1e-9), "this test")


def test_nearly_equal_frames_are_refused_by_name_and_not_blamed_on_the_export(
    tmp_path: Path, weights: dict[str, Path], plume: np.ndarray
) -> None:
    slow = np.stack([plume[0], plume[0] + 1e-4 * plume[1], plume[3]])
    with pytest.raises(FramesError, match=r"on slow 2×224×224 frames: pair 1 is nearly equal"):
        export_metric(
            "lsim", "safetensors", tmp_path, weights=weights["lsim"], frames={"slow": slow, "plume": plume}
        )
    assert not list(tmp_path.iterdir())


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        (("ssim", "onnx"), {}, ExportError, "not a learned"),
        (("lsim", "tflite"), {}, ExportError, "onnx, keras, safetensors"),
        (("lsim", "onnx"), {"size": 128}, ExportError, "any size"),
        (("nothing", "onnx"), {}, lsim.UnknownMetricError, "no metric named"),
        (("lsim", "safetensors"), {"frames": {"plume": np.zeros((1, 64, 64))}}, ValueError, "two plume"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_simulated(  # type: ignore[no-untyped-def]
    tmp_path: Path,
    weights: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    arguments,
    settings,
    error,
    message: str,
) -> None:
    monkeypatch.delattr("lsim.export.simulate_families")
    if arguments[0] == "lsim":
        settings = settings | {"weights": weights["lsim"]}
    with pytest.raises(error, match=message):
        export_metric(*arguments, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("extra", ["onnx", "keras"])
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, weights: dict[str, Path], monkeypatch: pytest.MonkeyPatch, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, extra, None)
    monkeypatch.delitem(sys.modules, f"lsim.export.{extra}", raising=False)
    monkeypatch.delattr(f"lsim.export.{extra}", raising=False)
    monkeypatch.delattr("lsim.export.simulate_families")
    with pytest.raises(ExportError, match=rf"'{extra}'.*lsim\[{extra}\]"):
        export_metric("lsim", extra, tmp_path, weights=weights["lsim"])  # type: ignore[arg-type]


# --- the command ------------------------------------------------------------------------------------------


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    def command(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["lsim", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0), "".join(capsys.readouterr())

    return command


def test_the_command_exports_and_says_how_well(
    tmp_path: Path, weights: dict[str, Path], command: Callable[..., tuple[int, str]]
) -> None:
    settings = ["--format", "safetensors", "--out", tmp_path / "new", "--weights", weights["lsim"]]
    code, printed = command("export", "lsim", *settings)
    assert code == 0, printed
    path = tmp_path / "new" / "lsim.weights.safetensors"
    assert str(path) in printed
    assert "difference 0.0e+00 in embeddings and 0.0e+00 in distances" in printed
    compared = json.loads(read_metadata(path)["agreement"])["frames"]
    assert {"random", "plume"} == {kind.split()[0] for kind in compared}


def test_the_command_says_in_a_line_what_it_cannot_export(
    tmp_path: Path, command: Callable[..., tuple[int, str]]
) -> None:
    code, printed = command("export", "ssim", "--format", "onnx", "--out", tmp_path)
    assert (code, printed) == (
        1,
        "error: metric 'ssim' is not a learned metric: it has no network to export\n",
    )
