"""The examples run from start to end, at settings too small to learn anything."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import lsim
from lsim.networks import LsimTrunk
from lsim.testing import write_random_checkpoint
from lsim.weights import load_checkpoint, save_checkpoint

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def autoencoder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("autoencoder_example", EXAMPLES / "autoencoder.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_code_holds_a_quarter_of_the_numbers(autoencoder: ModuleType) -> None:
    frames = torch.rand(2, 1, 48, 64)
    network = autoencoder.Autoencoder()
    assert network.encode(frames).numel() * 4 == frames.numel()
    assert network(frames).shape == frames.shape


@pytest.mark.filterwarnings("ignore::lsim.SizeWarning")
def test_both_trainings_are_judged_and_drawn(
    autoencoder: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("LSIM_WEIGHTS", str(tmp_path))
    weights = write_random_checkpoint(tmp_path / "random.pth", size=64)
    image, out = tmp_path / "image.png", tmp_path / "out.png"
    Image.fromarray(np.zeros((50, 47), np.uint8)).save(image)
    settings = f"--metric lsim --weights {weights} --families 2 --size 48 --epochs 1 --weight 1"
    autoencoder.main([*settings.split(), "--images", str(image), "--out", str(out)])

    said = capsys.readouterr().out
    rows = {line.split()[0]: line for line in said.splitlines() if line}
    assert {"l1", "l2", "psnr", "ssim", "vi"} <= rows.keys()
    assert rows["l2"].endswith("both, as MSE")
    first, second = map(float, rows["ssim"].split()[1:3])
    assert first != second, "the metric beside the MSE changed nothing"
    closer = "MSE + lsim" if second < first else "MSE"
    assert " ".join(rows["ssim"].split()[3:]) == f"{closer} in 1 of 1"
    verdict = next(line for line in said.splitlines() if line.startswith("By metrics that neither"))
    assert "l2" not in verdict
    assert "ssim" in verdict
    assert np.asarray(Image.open(out)).std() > 0


@pytest.mark.filterwarnings("ignore::lsim.SizeWarning")
@pytest.mark.parametrize("trained_on", ["lsim", "mine"])
def test_judges_by_the_weights_that_were_trained_with_and_takes_no_relative_for_another(
    autoencoder: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained_on: str
) -> None:
    torch.set_num_threads(1)
    own = tmp_path / "own.safetensors"
    random = write_random_checkpoint(tmp_path / "random.pth", size=64, seed=4)
    save_checkpoint(own, load_checkpoint(random, LsimTrunk), "lsim", {})
    monkeypatch.setenv("LSIM_WEIGHTS", str(tmp_path))
    metric = lsim.load_metric(trained_on, own, device="cpu", size=None)
    original = torch.rand(2, 3, 1, 48, 48)
    worse, better = (original + error * torch.rand_like(original) for error in (0.3, 0.1))

    judgements = {j.metric: j for j in autoencoder.judge(original, worse, better, metric)}
    of_mine = judgements[trained_on]
    expected = autoencoder.distances(metric, original, worse).mean()
    assert (of_mine.trained_on, of_mine.squared_error) == ("the second", pytest.approx(expected))
    assert judgements["lsim-open"].trained_on == "a relative of it"
    assert judgements["lsim-open"].squared_error != pytest.approx(expected, rel=1e-2)
    unrelated = {name for name, j in judgements.items() if not j.trained_on}
    assert {"l1", "ssim", "vi", "wasserstein"} <= unrelated
    assert not unrelated & {"l2", "rmse", "nrmse", "vrmse", "psnr", "lsim-open", trained_on}
    assert "ms-ssim" not in judgements, "frames are too small for it"
    by_ssim = {
        j.metric: j.trained_on for j in autoencoder.judge(original, worse, better, lsim.load_metric("ssim"))
    }
    assert (by_ssim["ssim"], by_ssim["lsim-open"]) == ("the second", "")


def test_verdict_follows_the_distances_and_leaves_out_what_was_trained_on(autoencoder: ModuleType) -> None:
    judgements = [
        autoencoder.Judgement("l1", "", 0.2, 0.1, 3),
        autoencoder.Judgement("l2", "both, as MSE", 0.1, 0.2, 0),
        autoencoder.Judgement("ssim", "", 0.1, 0.2, 1),
        autoencoder.Judgement("lsim", "the second", 0.2, 0.1, 4),
    ]
    lines = autoencoder.table(judgements, ["MSE", "MSE + lsim"], families=4).splitlines()
    assert "MSE is better by ssim; MSE + lsim is better by l1." in lines[-1]
    shown = {line.split()[0]: line for line in lines if line}
    assert "in 3 of 4" in shown["l1"]
    assert "in 3 of 4" in shown["ssim"]
