"""``array.lsim``: metrics on labelled arrays, in memory or lazily on Dask.

>>> import pipeline.accessor  # registers it
>>> ds["density"].lsim.pairwise("time", "ssim")          # doctest: +SKIP

Importing this loads neither torch nor Dask. A task of a lazy result holds how the metric is to be loaded; the
metric itself is loaded once per process, as on the workers of a run
(:func:`pipeline.workers.worker_metrics.get_metric`).
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import xarray as xr

if TYPE_CHECKING:
    from lsim.metric import Metric
    from pipeline.workers.worker_metrics import MetricRequest

Mask: TypeAlias = Literal["nan"] | xr.DataArray | None
Range: TypeAlias = tuple[Any, Any]
Weights: TypeAlias = xr.DataArray | np.ndarray | str | os.PathLike[str] | None
"""Of pixels, as an array; or of a network, as the path of a file."""


@xr.register_dataarray_accessor("lsim")
class Distances:
    """Distances between the frames of an array; see :meth:`pairwise` and :meth:`distance`."""

    def __init__(self, array: xr.DataArray) -> None:
        self._array = array

    def pairwise(
        self,
        dim: Hashable,
        metric: str | None = None,
        *,
        spatial: Sequence[Hashable] | None = None,
        channel: Hashable | None = None,
        scope: Literal["sequence", "pair", "none"] | Range = "sequence",
        mask: Mask = None,
        weights: Weights = None,
        device: str | None = None,
        **settings: Any,
    ) -> xr.DataArray:
        """All distances among the frames along a dimension.

        Parameters
        ----------
        dim : hashable
            The frames' dimension, such as ``"time"``. All others but ``spatial`` and ``channel`` are looped
            over: an ensemble gives a matrix per member.
        metric : str, optional
            As :func:`lsim.load_metric` takes it.
        spatial : two hashables, optional
            Dimensions of a frame, y and x. Default: the last two besides ``dim`` and ``channel``.
        channel : hashable, optional
            Dimension of channels, 1, 3 or 4 of them.
        scope : {"sequence", "pair", "none"} or (lo, hi), default "sequence"
            Over which frames minimum and maximum are taken: those of a matrix, each pair's, or fixed;
            ``"none"`` takes the values as they are, in the units of the array.
        mask : "nan" or DataArray of bool, optional
            Leave out single pixels: those that are NaN, and where the array is false.
        weights : DataArray, ndarray or path, optional
            A DataArray along one or both of ``spatial``, or an ndarray (y, x): weights of the pixels in
            means, such as ``np.cos(np.deg2rad(ds["lat"]))``, as :meth:`lsim.Metric.weighted` takes them. A
            path: a learned metric's weights, as :func:`lsim.load_metric` takes it.
        device : str, optional
            Default: the process's own, a GPU where it has one.
        **settings
            ``size``, ``order``, ``compat``, ``symmetrise``, ``precision`` and the
            metric's options, as :func:`lsim.load_metric` takes them.

        Returns
        -------
        DataArray of dims (…, dim, f"{dim}_other"), float64
            With the coordinates of ``dim`` on both, called after the metric; title, specification (JSON) and
            units in its attributes. The frames along ``dim`` are the references of a metric that isn't
            symmetric, and those along ``f"{dim}_other"`` are compared with them. Equal to
            :meth:`lsim.Metric.pairwise` to the bit. Lazy where the array is: chunks along ``dim``,
            ``spatial`` and ``channel`` are merged into one, the others stay.

        Raises
        ------
        ValueError
            For dimensions that aren't there, settings that the metric cannot take, and a mask or weights of
            other coordinates; for frames whose dtype, size or number of channels it cannot take. Before
            computing.
        """
        other = f"{dim}_other"
        array = _masked(self._array, mask)
        frame = _frame_dims(array, dim, spatial, channel)
        if other in array.dims:
            raise ValueError(f"the result's second dimension would be {other!r}, which the array has, too")
        if scope not in ("sequence", "pair", "none") and not _is_range(scope):
            raise ValueError(f"scope must be 'sequence', 'pair', 'none' or (lo, hi), got {scope!r}")
        pixels, file = _pixel_weights(array, frame, weights)
        loaded, request = _request(metric, mask is not None, settings | file, scope)
        loaded = loaded if pixels is None else loaded.weighted(pixels)
        core = (dim, *frame)
        count = array.sizes[dim]
        _check_frames(loaded, self._array, dim, frame, scope, resized=loaded.preprocessing.size is not None)
        found: xr.DataArray = xr.apply_ufunc(
            functools.partial(
                _pairwise,
                request=request,
                device=device,
                scope=scope,
                channels=channel is not None,
                weights=pixels,
            ),
            _in_one_chunk(array, core),
            input_core_dims=[core],
            output_core_dims=[(dim, other)],
            dask="parallelized",
            output_dtypes=[np.float64],
            dask_gufunc_kwargs={"output_sizes": {dim: count, other: count}},
        )
        # Coordinates along the frames, and not those that have a frame's dimensions, too.
        along = {name: c for name, c in array.coords.items() if c.dims == (dim,)}
        found = found.assign_coords(
            {f"{name}_other": (other, c.values, c.attrs) for name, c in along.items()}
        )
        return _described(found, loaded, scope, self._array, reference=str(dim))

    def distance(
        self,
        reference: xr.DataArray,
        metric: str | None = None,
        *,
        dim: Hashable | None = None,
        spatial: Sequence[Hashable] | None = None,
        channel: Hashable | None = None,
        scope: Literal["none"] | Range | None = None,
        mask: Mask = None,
        weights: Weights = None,
        device: str | None = None,
        **settings: Any,
    ) -> xr.DataArray:
        """Distances from the frames of a reference, frame by frame.

        Parameters
        ----------
        reference : DataArray
            What this array is compared with: a metric that isn't symmetric takes it first. Shared dimensions
            must have equal coordinates; others are looped over, so that a single reference is compared with
            every member.
        metric : str, optional
        dim : hashable, optional
            Minimum and maximum are taken over all frames along it, of both arrays, as
            :meth:`lsim.Metric.distance` does for a batch. Default: each pair's own.
        scope : (lo, hi) or "none", optional
            A fixed range instead; or the values as they are, in the units of the array.
        spatial, channel, mask, weights, device, **settings
            As :meth:`pairwise` takes them; ``spatial`` is by default the last two that both arrays have.

        Returns
        -------
        DataArray, float64
            Of all dimensions but ``spatial`` and ``channel``, called after the metric. The attribute
            ``reference`` has the name of the reference, or says that it has none.
        """
        if scope not in (None, "none") and not _is_range(scope):
            raise ValueError(
                f"scope must be (lo, hi) or 'none', got {scope!r}; dim says over which frames it is taken"
            )
        if scope == "none":
            _check_units(self._array, reference)
        one, two = _masked(self._array, mask), _masked(reference, mask)
        if spatial is None:
            spatial = _last_two([name for name in one.dims if name in two.dims], dim, channel)
        frame = _frame_dims(one, dim, spatial, channel)
        if missing := [name for name in (*frame, *([] if dim is None else [dim])) if name not in two.dims]:
            raise ValueError(f"the reference has no dimension {missing[0]!r}; it has {tuple(two.dims)}")
        pixels, file = _pixel_weights(one, frame, weights)
        loaded, request = _request(metric, mask is not None, settings | file, scope)
        loaded = loaded if pixels is None else loaded.weighted(pixels)
        core = frame if dim is None else (dim, *frame)
        settled = loaded.preprocessing
        # As published, metrics on 8 bit compare frames of the size that they have.
        as_they_are = loaded.published_on_8bit and settled.compat == "published"
        resized = settled.size is not None and not as_they_are
        for given in (self._array, reference):
            _check_frames(loaded, given, dim, frame, scope or "batch", resized=resized)
        found: xr.DataArray = xr.apply_ufunc(
            functools.partial(
                _distance, request=request, device=device, scope=scope or "batch",
                batch=dim is not None, channels=channel is not None, weights=pixels,
            ),
            _in_one_chunk(one, core),
            _in_one_chunk(two, core),
            input_core_dims=[core, core],
            output_core_dims=[() if dim is None else (dim,)],
            dask="parallelized",
            output_dtypes=[np.float64],
        )  # fmt: skip
        of = "an array without a name" if reference.name is None else str(reference.name)
        return _described(found, loaded, scope, self._array, reference=of)


# ---------------------------------------------------------------- in tasks


def _pairwise(
    frames: np.ndarray,
    *,
    request: MetricRequest,
    device: str | None,
    scope: Any,
    channels: bool,
    weights: np.ndarray | None,
) -> np.ndarray:
    """(…, n, y, x[, channel]) → (…, n, n)."""
    from lsim.preprocess import as_array
    from pipeline.workers.worker_metrics import get_metric

    metric, mask = get_metric(request, device), "nan" if request.mask else None
    frames = as_array(frames)  # a task's array may be masked
    frames = frames if channels else frames[..., None]
    outer, n = frames.shape[:-4], frames.shape[-4]
    out = np.empty((*outer, n, n))
    for index in np.ndindex(outer):
        out[index] = metric.pairwise(frames[index], scope, mask, weights)
    return out


def _distance(
    frames: np.ndarray,
    references: np.ndarray,
    *,
    request: MetricRequest,
    device: str | None,
    scope: Any,
    batch: bool,
    channels: bool,
    weights: np.ndarray | None,
) -> np.ndarray:
    """(…, [n,] y, x[, channel]) of both → (…[, n])."""
    from lsim.preprocess import as_array
    from pipeline.workers.worker_metrics import get_metric

    metric, mask = get_metric(request, device), "nan" if request.mask else None
    frames, references = (as_array(a) for a in (frames, references))
    frames, references = (a if channels else a[..., None] for a in (frames, references))
    frames, references = (a if batch else a[..., None, :, :, :] for a in (frames, references))
    outer = np.broadcast_shapes(frames.shape[:-4], references.shape[:-4])
    frames, references = (np.broadcast_to(a, (*outer, *a.shape[-4:])) for a in (frames, references))
    out = np.empty((*outer, frames.shape[-4]))
    for index in np.ndindex(outer):
        out[index] = metric.distance(references[index], frames[index], scope, mask, weights)
    return out if batch else out[..., 0]


# ---------------------------------------------------------------- before


def _request(
    name: str | None, masked: bool, settings: dict[str, Any], scope: Any
) -> tuple[Metric, MetricRequest]:
    """The metric, for what is known of it, and how tasks are to load it: wrong settings are errors here."""
    from lsim.registry import default_metric
    from pipeline.workers.worker_metrics import MetricRequest

    own = dict(settings)
    weights = own.pop("weights", None)
    common = {key: own.pop(key, default) for key, default in
              (("size", 224), ("order", 0), ("compat", "default"), ("symmetrise", False),
               ("precision", "exact"))}  # fmt: skip
    request = MetricRequest(
        default_metric() if name is None else name,
        None if weights is None else os.fspath(weights),
        mask=masked,
        options=tuple(sorted(own.items())),
        **common,
    )
    metric = request.load("cpu")
    if reason := metric.why_not_scope(scope):
        raise ValueError(reason)
    return metric, request.for_metric(metric)


def _frame_dims(
    array: xr.DataArray, dim: Hashable | None, spatial: Sequence[Hashable] | None, channel: Hashable | None
) -> tuple[Hashable, ...]:
    """The dimensions of a frame: y, x, and the channel where there is one."""
    if spatial is None:
        spatial = _last_two(array.dims, dim, channel)
    if len(spatial) != 2:
        raise ValueError(
            f"a frame has two dimensions, got {tuple(spatial)} of an array of {tuple(array.dims)}"
        )
    named = [*([] if dim is None else [dim]), *spatial, *([] if channel is None else [channel])]
    if missing := [name for name in named if name not in array.dims]:
        raise ValueError(f"no dimension {missing[0]!r}; the array has {tuple(array.dims)}")
    if len(set(named)) < len(named):
        raise ValueError(f"frames, y, x and channels need a dimension each, got {tuple(named)}")
    return tuple(named if dim is None else named[1:])


def _check_frames(
    metric: Metric,
    array: xr.DataArray,
    dim: Hashable | None,
    frame: Sequence[Hashable],
    scope: Any,
    *,
    resized: bool,
) -> None:
    """Refuse what a task would, as far as dtype, sizes and scope tell: a lazy array would say so too late."""
    import torch

    from lsim.preprocess import Preprocessing, apply, as_frames

    y, x, channels = (*(array.sizes[name] for name in frame), 1)[:3]
    n = 1 if dim is None else array.sizes[dim]
    as_frames(np.broadcast_to(np.zeros((), array.dtype), (n, y, x, channels)))
    apply(Preprocessing(size=None), torch.zeros(2, 1, 1, channels), scope)
    if not resized:
        metric.check_size(y, x)


def _check_units(array: xr.DataArray, reference: xr.DataArray) -> None:
    """Refuse values that are in units of different names: nothing here converts them."""
    own, other = (known.attrs.get("units") for known in (array, reference))
    if own is not None and other is not None and own != other:
        raise ValueError(
            f"the array is in {own!r} and the reference in {other!r}; expected the same units: convert one, "
            "or correct its attribute 'units'"
        )


def _last_two(dims: Sequence[Hashable], *but: Hashable | None) -> list[Hashable]:
    return [name for name in dims if name not in but][-2:]


def _masked(array: xr.DataArray, mask: Mask) -> xr.DataArray:
    """The array, NaN where a mask of labels leaves it out."""
    if mask is None or isinstance(mask, str):
        if mask not in (None, "nan"):
            raise ValueError(f"mask must be 'nan' or a DataArray of bool, got {mask!r}")
        return array
    if not isinstance(mask, xr.DataArray) or mask.dtype != np.bool_:
        raise ValueError(f"mask must be 'nan' or a DataArray of bool, got {type(mask).__name__}")
    if extra := [name for name in mask.dims if name not in array.dims]:
        raise ValueError(f"the mask has a dimension {extra[0]!r} that the array doesn't have")
    array, mask = xr.align(array, mask, join="exact", copy=False)
    floating = array if array.dtype.kind == "f" else array.astype(np.float64)
    return floating.where(mask).transpose(*array.dims)


def _pixel_weights(
    array: xr.DataArray, frame: Sequence[Hashable], weights: Weights
) -> tuple[np.ndarray | None, dict[str, Any]]:
    """Weights of pixels (y, x), and the setting of a learned metric's own, of which one at most is there."""
    if weights is None or isinstance(weights, str | os.PathLike):
        return None, {} if weights is None else {"weights": weights}
    spatial = frame[:2]
    if not isinstance(weights, xr.DataArray):
        return np.asarray(weights), {}
    if extra := [name for name in weights.dims if name not in spatial]:
        raise ValueError(
            f"weights of pixels lie along {tuple(spatial)} or one of these, and have a dimension {extra[0]!r}"
        )
    pixels = array.isel({name: 0 for name in array.dims if name not in spatial}, drop=True)
    pixels, aligned = xr.align(pixels, weights, join="exact", copy=False)
    return aligned.broadcast_like(pixels).transpose(*spatial).to_numpy(), {}


def _in_one_chunk(array: xr.DataArray, dims: Sequence[Hashable]) -> xr.DataArray:
    """A lazy array with its frames whole; one in memory as it is."""
    return array if array.chunks is None else array.chunk(dict.fromkeys(dims, -1))


def _is_range(scope: Any) -> bool:
    return isinstance(scope, tuple) and len(scope) == 2


def _described(
    found: xr.DataArray, metric: Metric, scope: Any, array: xr.DataArray, *, reference: str
) -> xr.DataArray:
    """Name a result after its metric, with attributes that say what made it."""
    found.name = metric.name
    units = metric.units(scope, str(array.attrs.get("units", "")))
    found.attrs = {
        "long_name": metric.info.title,
        "title": metric.info.title,
        **({"units": units} if units else {}),
        "reference": reference,
        "specification": json.dumps(metric.specification(), sort_keys=True),
    }
    return found
