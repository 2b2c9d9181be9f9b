"""The accessor ``array.lsim``: metrics on labelled arrays, in memory or lazily on Dask.

>>> import pipeline.accessor  # registers the accessor
>>> ds["density"].lsim.pairwise("time", "ssim")          # doctest: +SKIP

Importing this module loads neither torch nor Dask. A task of a lazy result contains a request for the metric,
which each process loads once (:func:`pipeline.workers.worker_metrics.get_metric`).
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
"""Pixel weights as an array, or the path of a network's weights."""


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
        """Compute all distances between the frames along a dimension.

        Parameters
        ----------
        dim : hashable
            Dimension of the frames, such as ``"time"``. The metric is applied for each index of the other
            dimensions: an ensemble gives a matrix per member.
        metric : str, optional
            Name of the metric, as in :func:`lsim.load_metric`.
        spatial : two hashables, optional
            Dimensions of a frame, y and x. Default: the last two besides ``dim`` and ``channel``.
        channel : hashable, optional
            Dimension of the 1, 3 or 4 channels.
        scope : {"sequence", "pair", "none"} or (lo, hi), default "sequence"
            Frames whose minimum and maximum normalise the values: all frames of a matrix, or each pair; or a
            fixed range. ``"none"`` keeps the values in the units of the array.
        mask : "nan" or DataArray of bool, optional
            Leave out pixels that are NaN; with an array, also those where it is false.
        weights : DataArray, ndarray or path, optional
            Weights of pixels in means, such as ``np.cos(np.deg2rad(ds["lat"]))``: a DataArray along one or
            both of ``spatial``, or an ndarray (y, x), see :meth:`lsim.Metric.weighted`. Or the path of a
            learned metric's weights, as in :func:`lsim.load_metric`.
        device : str, optional
            Default: the process's own, a GPU if it has one.
        **settings
            ``size``, ``order``, ``compat``, ``symmetrise``, ``precision`` and options of the metric, as in
            :func:`lsim.load_metric`.

        Returns
        -------
        DataArray of dims (…, dim, f"{dim}_other"), float64
            Named after the metric, with the coordinates of ``dim`` on both dimensions, and with title,
            specification (JSON) and units as attributes. For a metric that is not symmetric, frames along
            ``dim`` are the references. Bitwise equal to :meth:`lsim.Metric.pairwise`. Lazy if the array is:
            chunks along ``dim``, ``spatial`` and ``channel`` are merged, the others stay.

        Raises
        ------
        ValueError
            For unknown dimensions, settings that the metric doesn't support, a mask or weights with other
            coordinates, and frames whose dtype, size or number of channels the metric doesn't support. All
            are raised before anything is computed.
        """
        column_dim = f"{dim}_other"
        array = _masked(self._array, mask)
        frame = _frame_dims(array, dim, spatial, channel)
        if column_dim in array.dims:
            raise ValueError(
                f"the array already has a dimension {column_dim!r}, the second one of the result: rename it"
            )
        if scope not in ("sequence", "pair", "none") and not _is_range(scope):
            raise ValueError(f"scope must be 'sequence', 'pair', 'none' or (lo, hi), found {scope!r}")
        pixels, file = _pixel_weights(array, frame, weights)
        metric_object, request = _request(metric, mask is not None, settings | file, scope)
        metric_object = metric_object if pixels is None else metric_object.weighted(pixels)
        core = (dim, *frame)
        count = array.sizes[dim]
        _check_frames(
            metric_object,
            self._array,
            dim,
            frame,
            scope,
            resized=metric_object.preprocessing.size is not None,
        )
        matrix: xr.DataArray = xr.apply_ufunc(
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
            output_core_dims=[(dim, column_dim)],
            dask="parallelized",
            output_dtypes=[np.float64],
            dask_gufunc_kwargs={"output_sizes": {dim: count, column_dim: count}},
        )
        # Only coordinates along the frames alone: others have dimensions that the result lacks.
        frame_coords = {name: c for name, c in array.coords.items() if c.dims == (dim,)}
        matrix = matrix.assign_coords(
            {f"{name}_other": (column_dim, c.values, c.attrs) for name, c in frame_coords.items()}
        )
        return _with_attributes(matrix, metric_object, scope, self._array, reference=str(dim))

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
        """Compute the distances to the frames of a reference, frame by frame.

        Parameters
        ----------
        reference : DataArray
            Array to compare with; the first argument of a metric that is not symmetric. Shared dimensions
            must have equal coordinates. Others are broadcast: one reference is compared with each member.
        metric : str, optional
        dim : hashable, optional
            Dimension of frames that are normalised together, by their minimum and maximum in both arrays, as
            in :meth:`lsim.Metric.distance` for a batch. Default: each pair is normalised by itself.
        scope : (lo, hi) or "none", optional
            Normalise by a fixed range instead; or keep the values in the units of the array.
        spatial, channel, mask, weights, device, **settings
            As in :meth:`pairwise`. Default of ``spatial``: the last two dimensions that both arrays have.

        Returns
        -------
        DataArray, float64
            Named after the metric, with all dimensions but ``spatial`` and ``channel``. The attribute
            ``reference`` has the name of the reference, if it has one.
        """
        if scope not in (None, "none") and not _is_range(scope):
            raise ValueError(
                f"scope must be (lo, hi) or 'none', found {scope!r}; dim selects frames to normalise together"
            )
        if scope == "none":
            _check_units(self._array, reference)
        frames, references = _masked(self._array, mask), _masked(reference, mask)
        if spatial is None:
            spatial = _last_two([name for name in frames.dims if name in references.dims], dim, channel)
        frame = _frame_dims(frames, dim, spatial, channel)
        core = frame if dim is None else (dim, *frame)
        if missing := [name for name in core if name not in references.dims]:
            raise ValueError(
                f"the reference has no dimension {missing[0]!r}; it has {tuple(references.dims)}"
            )
        pixels, file = _pixel_weights(frames, frame, weights)
        metric_object, request = _request(metric, mask is not None, settings | file, scope)
        metric_object = metric_object if pixels is None else metric_object.weighted(pixels)
        preprocessing = metric_object.preprocessing
        # As published, metrics on 8 bit don't resize frames.
        keeps_size = metric_object.published_on_8bit and preprocessing.compat == "published"
        resized = preprocessing.size is not None and not keeps_size
        for array in (self._array, reference):
            _check_frames(metric_object, array, dim, frame, scope or "batch", resized=resized)
        distances: xr.DataArray = xr.apply_ufunc(
            functools.partial(
                _distance,
                request=request,
                device=device,
                scope=scope or "batch",
                batch=dim is not None,
                channels=channel is not None,
                weights=pixels,
            ),
            _in_one_chunk(frames, core),
            _in_one_chunk(references, core),
            input_core_dims=[core, core],
            output_core_dims=[() if dim is None else (dim,)],
            dask="parallelized",
            output_dtypes=[np.float64],
        )
        name = "an array without a name" if reference.name is None else str(reference.name)
        return _with_attributes(distances, metric_object, scope, self._array, reference=name)


# ---------------------------------------------------------------- tasks


def _pairwise(
    frames: np.ndarray,
    *,
    request: MetricRequest,
    device: str | None,
    scope: Any,
    channels: bool,
    weights: np.ndarray | None,
) -> np.ndarray:
    """Compute matrices of distances: (…, n, y, x[, channel]) → (…, n, n)."""
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
    """Compute distances frame by frame: two of (…, [n,] y, x[, channel]) → (…[, n])."""
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


# ---------------------------------------------------------------- checks and preparation


def _request(
    name: str | None, masked: bool, settings: dict[str, Any], scope: Any
) -> tuple[Metric, MetricRequest]:
    """Load the metric, check the settings, and build the request with which tasks load it."""
    from lsim.registry import default_metric
    from pipeline.workers.worker_metrics import MetricRequest

    options = dict(settings)
    weights = options.pop("weights", None)
    defaults = {"size": 224, "order": 0, "compat": "default", "symmetrise": False, "precision": "exact"}
    common = {name: options.pop(name, default) for name, default in defaults.items()}
    request = MetricRequest(
        default_metric() if name is None else name,
        None if weights is None else os.fspath(weights),
        mask=masked,
        options=tuple(sorted(options.items())),
        **common,
    )
    metric = request.load("cpu")
    if reason := metric.why_not_scope(scope):
        raise ValueError(reason)
    return metric, request.for_metric(metric)


def _frame_dims(
    array: xr.DataArray, dim: Hashable | None, spatial: Sequence[Hashable] | None, channel: Hashable | None
) -> tuple[Hashable, ...]:
    """Determine the dimensions of a frame: y, x, and the channel if there is one."""
    if spatial is None:
        spatial = _last_two(array.dims, dim, channel)
    if len(spatial) != 2:
        raise ValueError(
            f"a frame has two dimensions, found {tuple(spatial)} in an array with {tuple(array.dims)}"
        )
    names = [*([] if dim is None else [dim]), *spatial, *([] if channel is None else [channel])]
    if missing := [name for name in names if name not in array.dims]:
        raise ValueError(f"no dimension {missing[0]!r}; the array has {tuple(array.dims)}")
    if len(set(names)) < len(names):
        raise ValueError(f"frames, y, x and channels need a dimension each, found {tuple(names)}")
    return tuple(names if dim is None else names[1:])


def _check_frames(
    metric: Metric,
    array: xr.DataArray,
    dim: Hashable | None,
    frame: Sequence[Hashable],
    scope: Any,
    *,
    resized: bool,
) -> None:
    """Refuse dtypes, sizes and scopes that tasks would refuse: with a lazy array that would be too late."""
    import torch

    from lsim.preprocess import Preprocessing, apply, as_frames

    y, x, channels = (*(array.sizes[name] for name in frame), 1)[:3]
    n = 1 if dim is None else array.sizes[dim]
    as_frames(np.broadcast_to(np.zeros((), array.dtype), (n, y, x, channels)))
    apply(Preprocessing(size=None), torch.zeros(2, 1, 1, channels), scope)
    if not resized:
        metric.check_size(y, x)


def _check_units(array: xr.DataArray, reference: xr.DataArray) -> None:
    """Refuse arrays whose units have different names: units are not converted."""
    units, other_units = array.attrs.get("units"), reference.attrs.get("units")
    if units is not None and other_units is not None and units != other_units:
        raise ValueError(
            f"the array is in {units!r} and the reference in {other_units!r}; expected the same units: "
            "convert one, or correct its attribute 'units'"
        )


def _last_two(dims: Sequence[Hashable], *exclusions: Hashable | None) -> list[Hashable]:
    return [name for name in dims if name not in exclusions][-2:]


def _masked(array: xr.DataArray, mask: Mask) -> xr.DataArray:
    """Set pixels to NaN where a labelled mask is false."""
    if mask is None or isinstance(mask, str):
        if mask not in (None, "nan"):
            raise ValueError(f"mask must be 'nan' or a DataArray of bool, found {mask!r}")
        return array
    if not isinstance(mask, xr.DataArray) or mask.dtype != np.bool_:
        raise ValueError(f"mask must be 'nan' or a DataArray of bool, found {type(mask).__name__}")
    if extra := [name for name in mask.dims if name not in array.dims]:
        raise ValueError(f"the mask has a dimension {extra[0]!r} that the array doesn't have")
    array, mask = xr.align(array, mask, join="exact", copy=False)
    floating = array if array.dtype.kind == "f" else array.astype(np.float64)
    return floating.where(mask).transpose(*array.dims)


def _pixel_weights(
    array: xr.DataArray, frame: Sequence[Hashable], weights: Weights
) -> tuple[np.ndarray | None, dict[str, Any]]:
    """Split ``weights`` into pixel weights (y, x) and the setting for a network's file; one is empty."""
    if weights is None or isinstance(weights, str | os.PathLike):
        return None, {} if weights is None else {"weights": weights}
    spatial = frame[:2]
    if not isinstance(weights, xr.DataArray):
        return np.asarray(weights), {}
    if extra := [name for name in weights.dims if name not in spatial]:
        raise ValueError(
            f"weights of pixels: expected dimensions {tuple(spatial)} or one of them, found {extra[0]!r}"
        )
    pixels = array.isel({name: 0 for name in array.dims if name not in spatial}, drop=True)
    pixels, aligned = xr.align(pixels, weights, join="exact", copy=False)
    return aligned.broadcast_like(pixels).transpose(*spatial).to_numpy(), {}


def _in_one_chunk(array: xr.DataArray, dims: Sequence[Hashable]) -> xr.DataArray:
    """Merge chunks of a lazy array along the dimensions of a task; an array in memory is unchanged."""
    return array if array.chunks is None else array.chunk(dict.fromkeys(dims, -1))


def _is_range(scope: Any) -> bool:
    return isinstance(scope, tuple) and len(scope) == 2


def _with_attributes(
    result: xr.DataArray, metric: Metric, scope: Any, array: xr.DataArray, *, reference: str
) -> xr.DataArray:
    """Name a result after its metric, and describe the metric in the result's attributes."""
    result.name = metric.name
    units = metric.units(scope, str(array.attrs.get("units", "")))
    result.attrs = {
        "long_name": metric.info.title,
        "title": metric.info.title,
        **({"units": units} if units else {}),
        "reference": reference,
        "specification": json.dumps(metric.specification(), sort_keys=True),
    }
    return result
