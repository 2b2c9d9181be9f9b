"""Metrics of one's own that break what they claim: each fails by name, and no other is the worse for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from matrices import archive_of, matrices_of, write_archive

import lsim
from lsim.claims import MetricError, OthersCode
from lsim.testing import check_metric
from pipeline.distances import compute_distances
from pipeline.matrix import MatrixRequest, compute_matrix
from pipeline.matrix.embeddings import compute_embeddings
from pipeline.metrics.settings import Settings
from pipeline.storage import store
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile

HONEST = '''
import sys
import numpy as np
import torch
from lsim import Embedding, Metric, MetricInfo
from lsim.metrics.pixel import L2

NAN = float("nan")


class Honest(Metric):
    """Mean squared difference."""

    info = MetricInfo(title="honest", source="this test")

    def embed(self, frames):
        return Embedding({"values": frames.flatten(1).double()})

    def compare(self, a, b):
        return (a.parts["values"][:, None] - b.parts["values"][None]).square().mean(2)
'''

COMPARED = {
    "Negative": ("return -super().compare(a, b)", "claims to be non-negative, and gave -"),
    "OneSided": (
        "d = a.parts['values'].mean(1)[:, None] - b.parts['values'].mean(1)\n"
        "        return super().compare(a, b) + d.clamp(min=0)",
        "claims to be symmetric, and gave d(",
    ),
    "Complex": ("return super().compare(a, b) + 1j", "gave distances of torch.complex128"),
    "Whole": ("return super().compare(a, b).round().long()", "gave distances of torch.int64"),
    "Half": ("return super().compare(a, b).half()", "gave distances of torch.float16"),
    "Flat": ("return super().compare(a, b).flatten()", "compare gave a block of shape"),
    "Listed": ("return super().compare(a, b).tolist()", "compare gave list, expected a torch.Tensor"),
    "Numpy": ("return super().compare(a, b).numpy()", "compare gave numpy.ndarray"),
    "FarFromItself": (
        "d = super().compare(a, b) + 1\n        return d if a is not b else d.fill_diagonal_(0)",
        "claims a distance of 0 from any frame to itself, and gave 1",
    ),
    "Random": ("return super().compare(a, b) * (1 + torch.rand(()))", "another result for the same frames"),
    "Counting": (
        "self.calls = getattr(self, 'calls', 0) + 1\n        return super().compare(a, b) * self.calls",
        "another result for the same frames",
    ),
    "Writing": (
        "a.parts['values'].zero_()\n        return super().compare(a, b)",
        "compare wrote into the embed",
    ),
    "Exiting": ("sys.exit(0)", "compare raised SystemExit: 0"),
    "Interrupting": ("raise KeyboardInterrupt", "compare raised KeyboardInterrupt"),
    "Generating": ("raise GeneratorExit", "compare raised GeneratorExit"),
    "Doubling": (
        "torch.set_default_dtype(torch.float64)\n        return super().compare(a, b)",
        "compare changed torch's default dtype",
    ),
    "Threading": (
        "torch.set_num_threads(torch.get_num_threads() + 1)\n        return super().compare(a, b)",
        "torch's number of threads",
    ),
    "Learning": (
        "torch.set_grad_enabled(True)\n        return super().compare(a, b)",
        "torch's gradient mode",
    ),
    "Strict": ("np.seterr(all='raise')\n        return super().compare(a, b)", "NumPy's treatment"),
}
"""What compare does, by class, and what is said of it."""

EMBEDDED = {
    "Short": ("return Embedding({'values': frames.flatten(1)[1:]})", "expected one entry a frame"),
    "Uneven": (
        "return Embedding({'values': frames.flatten(1), 'more': frames.new_zeros(len(frames) + 1)})",
        "embed gave its part 'more'",
    ),
    "Array": ("return Embedding({'values': frames.flatten(1).numpy()})", "gave numpy.ndarray for its part"),
    "Bare": ("return frames.flatten(1)", "expected an lsim.Embedding"),
    "Empty": ("return Embedding({})", "without parts"),
    "Overwriting": ("frames.mul_(2)\n        return super().embed(frames)", "embed wrote into the frames"),
    "OverwritingByNumpy": (
        "frames.numpy()[...] = frames.numpy()[:, ::-1].copy() * 2\n        return super().embed(frames)",
        "embed wrote into the frames",
    ),
    "Noisy": (
        "return Embedding({'values': frames.flatten(1).double() + torch.rand(())})",
        "another result for the same frames",
    ),
    "Leaving": ("sys.exit('no licence')", "embed raised SystemExit: no licence"),
}
"""What embed does."""

HARMLESS = (
    ("Gradual", "compare", "return super().compare(a, b).requires_grad_()"),
    (
        "Seeding",
        "compare",
        "torch.manual_seed(0)\n        return super().compare(a, b) * (1 + torch.rand(()))",
    ),
    ("Single", "compare", "return super().compare(a, b).float()"),
)
"""What may be done."""

POISONOUS = '''

class Twice(L2):
    """Of the name of a family, whose frames it embeds otherwise."""

    def embed(self, frames):
        return Embedding({"values": 2 * frames.flatten(1).float()})


class Erasing(L2):
    """Of a family, and writes past torch into what that shares."""

    def compare(self, a, b):
        distances = super().compare(a, b)
        a.parts["values"].numpy()[...] = 0
        return distances
'''


def name_of(cls: str) -> str:
    return lsim.registry.metric_name(f"module:{cls}")


def source() -> str:
    text = HONEST
    methods = [(cls, "compare", body) for cls, (body, _) in COMPARED.items()]
    methods += [(cls, "embed", body) for cls, (body, _) in EMBEDDED.items()]
    for cls, method, body in (*methods, *HARMLESS):
        arguments = "a, b" if method == "compare" else "frames"
        text += f"\n\nclass {cls}(Honest):\n    def {method}(self, {arguments}):\n        {body}\n"
    return text + POISONOUS


BREACHES = {name_of(cls): words for cls, (_, words) in (COMPARED | EMBEDDED).items()}


def find_modules(folder: str) -> None:
    """Have this process import modules from a folder."""
    if folder not in sys.path:
        sys.path.insert(0, folder)


@pytest.fixture(scope="module")
def module(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("strangers")
    (folder / "strangers_of_others.py").write_text(source())
    sys.path.insert(0, str(folder))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), before]))
    yield "strangers_of_others"
    os.environ["PYTHONPATH"] = before or ""
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> Path:
    return write_archive(
        tmp_path_factory.mktemp("claims") / "frames.zarr", archive_of(3, frames=4, size=16, channels=3)
    )


def settings(module: str, **changes) -> Settings:
    # Between the others, so that what is shared is shared with them.
    strangers = [f"{module}:{cls}" for cls in (*COMPARED, *EMBEDDED, *(cls for cls, _, _ in HARMLESS))]
    metrics = ("rmse", f"{module}:Erasing", f"{module}:Twice", *strangers, "l2", "ssim", f"{module}:Honest")
    return Settings(**({"metrics": metrics, "size": None} | changes))


OURS = ("rmse", "l2", "ssim")


def check(found: dict[str, np.ndarray], plain: dict[str, np.ndarray], reasons: dict[str, set[str]]) -> None:
    """Our metrics have the bits that they have alone; each breach is its metric's failure, in words."""
    for name in OURS:
        np.testing.assert_array_equal(found[name], plain[name])
    assert reasons.keys() == BREACHES.keys()
    for name, words in BREACHES.items():
        for reason in reasons[name]:
            assert f"metric {name!r}" in reason
            assert words in reason
        apart = found[name][np.isfinite(found[name])]
        assert not apart.any(), name
    for cls in ("Gradual", "Single", "Seeding"):
        assert np.isfinite(found[name_of(cls)]).all()
    np.testing.assert_array_equal(found["gradual"], found["honest"])
    np.testing.assert_array_equal(found["erasing"], plain["l2"])
    np.testing.assert_allclose(found["twice"], 4 * plain["l2"], rtol=1e-5)


@pytest.fixture
def alone() -> Iterator[Cluster]:
    with Cluster(Profile(kind="none")) as cluster:
        yield cluster


@pytest.mark.parametrize("kind", ["alone", "two_workers"])
def test_in_a_run_each_breach_is_its_metrics_failure_and_nobody_elses(
    tmp_path, module, frames, request, kind
):
    cluster = request.getfixturevalue(kind)
    if cluster.client is not None:  # its workers may have started before the module was there
        cluster.client.run(find_modules, os.environ["PYTHONPATH"].split(os.pathsep)[0])
    compute_distances(frames, tmp_path / "plain.zarr", settings(module, metrics=OURS), cluster=cluster)
    report = compute_distances(frames, tmp_path / "d.zarr", settings(module), cluster=cluster)
    reasons: dict[str, set[str]] = {}
    for failure in report.failures:
        reasons.setdefault(failure.metric, set()).add(failure.reason)
    check(matrices_of(tmp_path / "d.zarr"), matrices_of(tmp_path / "plain.zarr"), reasons)
    # All sequences of a metric that gives something else each time, not only those that were asked twice.
    assert sum(failure.metric == "random" for failure in report.failures) == 3
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize("changes", [{"pairs": "reference"}, {"scope": "pair"}], ids=["reference", "pair"])
def test_in_a_row_and_in_pairs_too(tmp_path, module, frames, changes):
    with Cluster(Profile(kind="none")) as cluster:
        plain = settings(module, metrics=OURS, **changes)
        compute_distances(frames, tmp_path / "plain.zarr", plain, cluster=cluster)
        report = compute_distances(frames, tmp_path / "d.zarr", settings(module, **changes), cluster=cluster)
    assert {failure.metric for failure in report.failures} == BREACHES.keys()
    for name in OURS:
        found, expected = (matrices_of(tmp_path / path)[name] for path in ("d.zarr", "plain.zarr"))
        np.testing.assert_array_equal(found, expected)


def test_in_a_matrix_too(tmp_path, module, frames):
    def compute(out: str, **changes) -> dict[str, set[str]]:
        own = settings(module, scope=(-2, 2), **changes)
        with Cluster(Profile(kind="none")) as cluster:
            report = compute_matrix(frames, tmp_path / out, own, MatrixRequest(tile=7), cluster=cluster)
        reasons: dict[str, set[str]] = {}
        for failure in report.failures:
            reasons.setdefault(failure.metric, set()).add(failure.reason)
        return reasons

    assert not compute("plain.zarr", metrics=OURS)
    reasons = compute("a.zarr")
    found, plain = (
        {name: store.get_array(store.open_store(tmp_path / path), f"A/density/{name}")[:] for name in names}
        for path, names in (
            ("a.zarr", (*OURS, *BREACHES, "gradual", "single", "seeding", "honest", "erasing", "twice")),
            ("plain.zarr", OURS),
        )
    )
    check(found, plain, reasons)


def test_infinite_distances_are_missing_ones_in_a_matrix(tmp_path, frames, monkeypatch):
    (tmp_path / "far_of_others.py").write_text(
        HONEST
        + "\n\nclass Far(Honest):\n    def compare(self, a, b):\n        values = super().compare(a, b)\n"
        + "        return torch.where(values > 100, torch.inf, values)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = settings("far_of_others", metrics=("far_of_others:Far",), scope=(-2, 2))
    with Cluster(Profile(kind="none")) as cluster:
        report = compute_matrix(frames, tmp_path / "m.zarr", own, cluster=cluster)
    (failure,) = report.failures
    assert "NaN or infinity for" in failure.reason
    stored = store.get_array(store.open_store(tmp_path / "m.zarr"), "A/density/far")[:]
    assert not np.isinf(stored).any()
    assert np.isnan(stored).any()
    assert np.isfinite(stored).any()


def test_embeddings_that_are_others_each_time_are_not_kept(tmp_path, module, frames):
    with Cluster(Profile(kind="none")) as cluster:
        own = settings(module, metrics=(f"{module}:Noisy",), scope=(-2, 2))
        report = compute_embeddings(frames, tmp_path / "e.zarr", own, cluster=cluster)
    assert report.computed == 0
    assert all("another result for the same frames" in failure.reason for failure in report.failures)
    assert sum(len(failure.numbers) for failure in report.failures) == 12


def test_the_contract_names_each_breach(module):
    check_metric(lsim.load_metric(f"{module}:Honest", size=None), frame_size=16)
    for cls in (*COMPARED, *EMBEDDED):
        words = (COMPARED | EMBEDDED)[cls][1]
        with pytest.raises((AssertionError, MetricError)) as raised:
            check_metric(lsim.load_metric(f"{module}:{cls}", size=None), frame_size=16)
        assert words in str(raised.value), cls
    assert torch.get_default_dtype() is torch.float32
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "code", ["import sys; sys.exit(0)", "raise KeyboardInterrupt", "raise GeneratorExit"]
)
@pytest.mark.parametrize("where", ["import", "init"])
def test_a_metric_that_ends_the_process_as_it_is_loaded_is_an_error(tmp_path, monkeypatch, code, where):
    name = f"ends_{abs(hash((code, where)))}"
    body = f"    def __init__(self, *args):\n        {code}\n" if where == "init" else ""
    text = HONEST + (code if where == "import" else f"\n\nclass Ends(Honest):\n{body}")
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MetricError, match=r"metric 'ends': .* raised .*, as if to end"):
        lsim.load_metric(f"{name}:Ends", size=None)


def test_claims_that_are_none_are_refused_when_a_metric_is_loaded(tmp_path, monkeypatch):
    info = 'info = MetricInfo(title="", source="", {})'
    wrong = {
        "axioms=frozenset({'non_negative'})": "claims non_negative",
        "lower_is_more_similar=False": "similarity",
    }
    for number, (claim, words) in enumerate(wrong.items()):
        (tmp_path / f"claiming_{number}.py").write_text(
            f"{HONEST}\n\nclass C(Honest):\n    {info.format(claim)}\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(lsim.UnknownMetricError, match=words):
            lsim.load_metric(f"claiming_{number}:C")


# ---------------------------------------------------------------- signals are the user's


@pytest.mark.parametrize(
    "body",
    [
        "{wait}",
        "try:\n        {wait}\n    except BaseException:\n        sys.exit(3)",
        "try:\n        {wait}\n    except BaseException:\n        raise RuntimeError from None",
        "try:\n        {wait}\n    except BaseException:\n        pass",
    ],
    ids=["as it is", "made an exit", "made an error", "swallowed"],
)
def test_ctrl_c_is_the_users_whatever_a_metric_makes_of_it(body):
    function = textwrap.indent(body.format(wait="signal.raise_signal(signal.SIGINT)"), "    ")
    space: dict = {"signal": signal, "sys": sys}
    exec(f"def work():\n{function.replace(chr(10) + '    ', chr(10))}", space)
    # Libraries may have put a handler of their own in its place: dask_jobqueue.runner does as it is imported.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), OthersCode("m", "compare"):
            space["work"]()
    finally:
        left = signal.signal(signal.SIGINT, before)
    assert left is signal.default_int_handler


def test_what_a_handler_of_ones_own_raises_comes_out_as_it_is():
    class Ended(SystemExit):
        pass

    def end(number, frame):
        raise Ended

    before = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(Ended), OthersCode("m", "compare"):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_ends_by_a_signal_while_a_metric_of_ones_own_computes(tmp_path, frames, number, code):
    (tmp_path / "slow_of_others.py").write_text(
        HONEST
        + "\n\nclass Slow(Honest):\n    def compare(self, a, b):\n        import time, pathlib\n"
        + "        pathlib.Path('began').touch()\n        time.sleep(0.5)\n"
        + "        return super().compare(a, b)\n"
    )
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "distances", str(frames)]
    command += ["--out", "d.zarr", "--metrics", "slow_of_others:Slow", "--size", "0", "--cluster", "none"]
    command += ["--block", "1"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "began").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, output
    assert b"stopped; what is finished is kept" in output
