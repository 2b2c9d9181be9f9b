"""Metrics by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import lsim
from lsim import registry
from lsim.testing import check_metric, write_random_checkpoint

NAMES = [
    *("l1", "l2", "rmse", "nrmse", "vrmse", "psnr", "correlation", "cosine"),
    *("max-error", "nmae", "crmse", "brmse", "frmse-low", "frmse-mid", "frmse-high"),
    *("spectral-mse-low", "spectral-mse-mid", "spectral-mse-high", "h1", "fss"),
    *("ssim", "ssim-gaussian", "ms-ssim", "gmsd", "gradient"),
    *("vi", "mutual-information", "nmi"),
    *("spectral", "fft", "wasserstein", "sliced-wasserstein"),
    *("flow", "lpips-alex", "lpips-vgg", "lpips-squeeze"),
    *("lsim-open", "lsim", "lsim-noiseless", "lsim-strong-noise", "lsim-skip", "non-siamese"),
]
NOT_SYMMETRIC = {"nrmse", "vrmse", "nmae", "non-siamese"}
NOT_DIFFERENTIABLE = {"fss", "vi", "mutual-information", "nmi", "flow"}
TAKE_MASKS = set(NAMES[: NAMES.index("frmse-low")]) | set(NAMES[NAMES.index("ssim") : NAMES.index("vi")])
OBEY_THE_TRIANGLE = {
    *("max-error", "crmse", "brmse", "frmse-low", "frmse-mid", "frmse-high", "h1"),
    *("l1", "rmse", "gradient", "vi", "mutual-information", "nmi"),
    *("spectral", "fft", "wasserstein", "sliced-wasserstein"),
    *("lsim-open", "lsim", "lsim-noiseless", "lsim-strong-noise", "lsim-skip"),
}


def test_names_in_order() -> None:
    assert lsim.list_metrics() == NAMES
    lsim.list_metrics().clear()
    assert lsim.list_metrics() == NAMES


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("lsim_skip", "'lsim-skip'"),
        ("LSIM-skip", "'lsim-skip'"),
        ("sim", "'ssim' or 'lsim'"),
        ("pnsr", "'psnr'"),
    ],
)
def test_unknown_name_suggests_near_ones(wrong: str, near: str) -> None:
    with pytest.raises(lsim.UnknownMetricError) as error:
        lsim.load_metric(wrong)
    message = str(error.value)
    assert message.startswith(f"no metric named {wrong!r}; did you mean ")
    assert set(near.split(" or ")) <= set(message.partition("did you mean ")[2].rstrip("?").split(" or "))


def test_unknown_name_far_from_all_lists_them() -> None:
    with pytest.raises(KeyError) as error:
        lsim.load_metric("hausdorff")
    assert str(error.value) == f"no metric named 'hausdorff'; there are {', '.join(NAMES)}"


def test_description_says_what_is_known() -> None:
    described = {metric.name: metric for metric in lsim.describe_metrics()}
    assert list(described) == NAMES
    for name, metric in described.items():
        info = metric.info
        assert info.title, name
        assert info.source, name
        assert info.lower_is_more_similar, name
        assert info.axioms <= {"non-negative", "symmetric", "zero-on-itself", "triangle", "euclidean"}, name
        assert ("symmetric" in info.axioms) == (name not in NOT_SYMMETRIC), name
        assert info.differentiable == (name not in NOT_DIFFERENTIABLE), name
        assert info.takes_mask == (name in TAKE_MASKS), name
        assert ("triangle" in info.axioms) == (name in OBEY_THE_TRIANGLE), name
    assert described["lsim"].info.advised_sizes == (128, 512)


def test_description_says_why_a_metric_cannot_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LSIM_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("lsim.weights.cache_folder", lambda: tmp_path / "cache")
    write_random_checkpoint(tmp_path / "SkipConnections.pth")
    unavailable = {metric.name: metric.unavailable for metric in lsim.describe_metrics()}
    assert not any(unavailable[name] for name in ("l1", "l2", "psnr", "ssim", "vi"))
    assert "lsim weights fetch lsim-noiseless" in unavailable["lsim-noiseless"]
    assert "SHA-256" in unavailable["lsim-skip"]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Installs a package with entry points for metrics, for the time of the test."""
    registry.registered.cache_clear()

    def install(module: str, entry_points: str) -> None:
        (tmp_path / "their_metrics.py").write_text(module)
        metadata = tmp_path / "their_metrics-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: their-metrics\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[lsim.metrics]\n{entry_points}\n")
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    registry.registered.cache_clear()
    sys.modules.pop("their_metrics", None)


def test_metrics_of_other_packages(installed: Callable[..., None]) -> None:
    installed("from lsim.metrics.pixel import L2\nclass Theirs(L2): pass\n", "theirs = their_metrics:Theirs")
    metric = lsim.load_metric("theirs", size=32, device="cpu")
    assert (metric.name, type(metric).__name__) == ("theirs", "Theirs")
    assert lsim.list_metrics() == [*NAMES, "theirs"]
    check_metric(metric)


def test_metrics_of_other_packages_replace_none(installed: Callable[..., None]) -> None:
    installed("from lsim.metrics.pixel import L1\n", "l2 = their_metrics:L1")
    with pytest.warns(UserWarning, match=r"their_metrics:L1 would replace metric 'l2': ignored"):
        assert type(lsim.load_metric("l2")).__name__ == "L2"


@pytest.mark.parametrize(
    ("module", "cause"),
    [
        ("import a_module_that_is_not_there\n", "No module named 'a_module_that_is_not_there'"),
        ("", "has no attribute 'Theirs'"),
        ("raise RuntimeError('no licence')\n", "RuntimeError: no licence"),
        ("Theirs: int =\n", "SyntaxError: invalid syntax"),
        ("class Theirs: pass\n", "is no subclass of lsim.Metric"),
        ("def Theirs(): pass\n", "is no subclass of lsim.Metric"),
        ("from lsim import Metric\nclass Theirs(Metric): pass\n", "incomplete: missing compare, embed, info"),
    ],
)
def test_broken_package_leaves_the_others(installed: Callable[..., None], module: str, cause: str) -> None:
    installed(module, "theirs = their_metrics:Theirs")
    with pytest.warns(UserWarning, match=r"'theirs' \(their_metrics:Theirs\) is left out: ") as warned:
        assert lsim.list_metrics() == NAMES
    assert cause in str(warned[0].message)
    assert [metric.name for metric in lsim.describe_metrics()] == NAMES
    with pytest.raises(lsim.UnknownMetricError, match="no metric named 'theirs'"):
        lsim.load_metric("theirs")


@pytest.mark.parametrize(
    ("name", "smallest"), [("ssim", 7), ("ms-ssim", 161), ("gmsd", 3), ("lsim-open", 44)]
)
def test_a_size_that_a_metric_cannot_take_is_an_error_of_loading_it(name: str, smallest: int) -> None:
    assert lsim.load_metric(name, size=smallest, device="cpu").preprocessing.size == smallest
    with pytest.raises(lsim.FramesError, match=f"{name!r}.*smallest that works is {smallest}×{smallest}"):
        lsim.load_metric(name, size=smallest - 1, device="cpu")
