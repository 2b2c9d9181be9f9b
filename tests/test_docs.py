"""The Python on the pages runs: block after block, a page in one namespace, in a folder of its own."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matrices import archive_of, smooth_sequence, write_archive
from synthetic import make_matrix

from lsim.networks import LsimTrunk
from lsim.testing import write_random_checkpoint
from lsim.weights import load_checkpoint, save_checkpoint
from pipeline.matrix.embeddings import compute_embeddings
from pipeline.metrics.settings import Settings
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("write-a-metric.md", "xarray.md", "metrics.md", "matrix.md")


def blocks(page: str) -> list[tuple[int, str]]:
    """Line and text of the fenced Python on a page."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n"), match.group(1)) for match in found]


@pytest.fixture
def given() -> dict[str, Any]:
    """What pages take for granted: two frames, a sequence, two batches of tensors in [0, 255]."""
    rng = torch.Generator().manual_seed(0)
    frames = smooth_sequence(0, frames=4, size=64, channels=3)
    reference, other = (255 * torch.rand(2, 3, 64, 64, generator=rng) for _ in range(2))
    return {"a": frames[0], "b": frames[1], "frames": frames, "reference": reference, "other": other}


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("ignore::lsim.SizeWarning")
def test_pages_run(page, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    # The files that pages speak of.
    pickled = write_random_checkpoint(tmp_path / "random.pth", size=64)
    (tmp_path / "my-run").mkdir()
    checkpoint = load_checkpoint(pickled, LsimTrunk)
    save_checkpoint(tmp_path / "my-run" / "weights.safetensors", checkpoint, "lsim", {})
    if page == "matrix.md":
        _make_stores(tmp_path)
    found = blocks(page)
    assert found
    if page == "write-a-metric.md":
        (tmp_path / "energy.py").write_text(found[0][1])
    for line, source in found:
        code = compile("\n" * line + source, str(DOCS / page), "exec")
        exec(code, given)
    sys.modules.pop("energy", None)


def _make_stores(folder: Path) -> None:
    """An archive and embeddings of it, as the commands of the page make them."""
    make_matrix(folder / "matrix.zarr", {"A/density": {"A/density": 2}})
    frames = write_archive(folder / "frames.zarr", archive_of(2))
    settings = Settings(metrics=("lsim-open",), size=64, scope="dataset")
    with Cluster(Profile(kind="none")) as cluster:
        compute_embeddings(frames, folder / "embeddings.zarr", settings, cluster=cluster)


def test_metrics_of_the_page_pass_the_contract(given):
    import lsim
    from lsim.preprocess import Preprocessing

    for _, source in blocks("write-a-metric.md"):
        if "class " in source:
            exec(source, given)
    for name in ("Rise", "Power", "CommonMean"):
        metric = given[name](name.lower(), Preprocessing(None), torch.device("cpu"))
        lsim.testing.check_metric(metric, frame_size=16)
    power = given["Power"]("power", Preprocessing(None), torch.device("cpu"), exponent=1.0)
    assert power.options == {"exponent": 1.0}
    assert np.isfinite(power.pairwise(given["frames"])).all()
