"""Every differentiable metric, as a loss by every normalisation, goes through torch's transformations."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.nn import functional as F

import lsim
from lsim.loss import SimulationLoss
from lsim.registry import METRICS

CLASSIC = [name for name, cls in METRICS.items() if cls.info.differentiable and name in
           list(METRICS)[: list(METRICS).index("flow")]]  # fmt: skip
NORMALISATIONS = ["pair", "target", (-3.1, 3.1), None]
SIDES = {"ms-ssim": 161, "lsim-open": 48, "frmse-high": 26}
# Shells are traced one by one: three of them are the same loop as thirteen.
SIDES_COMPILED = SIDES | {"spectral": 4}
# The code that another metric here is traced with: its embedding, or another band of its wavenumbers.
TRACED_ALREADY = ("fft", "frmse-low", "frmse-mid", "spectral-mse-low", "spectral-mse-mid")
OF_EACH_KIND = ("l2", "correlation", "ssim", "gmsd", "fft", "wasserstein", "lsim-open")
pytestmark = pytest.mark.filterwarnings("ignore::lsim.SizeWarning", "ignore::lsim.RangeWarning")


@functools.cache
def load(name: str) -> lsim.Metric:
    return lsim.load_metric(name, size=None, device="cpu")


def frames(side: int, normalisation: object) -> tuple[Tensor, Tensor]:
    coarse = torch.randn(2, 2, 2, 9, 9, generator=torch.Generator().manual_seed(2))
    smooth = F.interpolate(coarse.flatten(0, 1), (side, side), mode="bicubic").unflatten(0, (2, 2, 1))
    smooth = smooth if normalisation is not None else 128 + 30 * smooth
    return smooth[0] * 0.3 + smooth[1] * 0.7, smooth[1]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5 * expected.abs().max().item())


# All metrics go through the most of normalising and through none of it; the two between depend on no metric,
# and are shown on one of each kind. "ms-ssim" is "ssim-gaussian" at five scales, on frames that make it a
# hundred times as slow.
@pytest.mark.parametrize(
    ("name", "normalisation"),
    [
        *itertools.product(
            (name for name in [*CLASSIC, "lsim-open"] if name != "ms-ssim"), (NORMALISATIONS[0], None)
        ),
        *itertools.product(OF_EACH_KIND, NORMALISATIONS[1:3]),
        ("ms-ssim", "pair"),
    ],
)
def test_transformed_losses_are_those_of_a_loop(name: str, normalisation: object) -> None:
    loss = SimulationLoss(load(name), normalisation=normalisation)  # type: ignore[arg-type]
    predictions, targets = frames(SIDES.get(name, 24), normalisation)
    values, gradients = [], []
    for prediction, target in zip(predictions, targets, strict=True):
        leaf = prediction.clone().requires_grad_()
        value = loss(leaf, target)
        gradients += torch.autograd.grad(value, leaf)
        values.append(value.detach())
    close(vmap(loss)(predictions, targets), torch.stack(values))
    close(grad(loss)(predictions[0], targets[0]), gradients[0])
    close(vmap(grad(loss))(predictions, targets), torch.stack(gradients))
    along = gradients[0] / gradients[0].norm()
    expected = (gradients[0] * along).sum()
    close(jvp(lambda x: loss(x, targets[0]), (predictions[0],), (along,))[1], expected)
    with forward_ad.dual_level():
        dual = loss(forward_ad.make_dual(predictions[0], along), targets[0])
        close(forward_ad.unpack_dual(dual).tangent, expected)


@pytest.mark.parametrize("name", [*(name for name in CLASSIC if name not in TRACED_ALREADY), "lsim-open"])
def test_losses_compile_into_one_graph(name: str) -> None:
    torch._dynamo.reset()
    loss = SimulationLoss(load(name), normalisation=(-3.1, 3.1))
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    predictions, targets = frames(SIDES_COMPILED.get(name, 24), "pair")
    found = []
    for function in (loss, compiled):
        leaf = predictions[0].clone().requires_grad_()
        value = function(leaf, targets[0])
        found.append((value.detach(), *torch.autograd.grad(value, leaf)))
    for part, expected in zip(*reversed(found), strict=True):
        close(part, expected)
