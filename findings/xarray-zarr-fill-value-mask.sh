#!/usr/bin/env bash
# xarray 2026.9.0: open_dataset(engine="zarr", use_zarr_fill_value_as_mask=False) has no effect.
# Expected: as documented, zeros of a Zarr 2 array whose fill_value is zarr's default, 0, stay zeros with False.
# Observed: they are NaN, as with True. ZarrBackendEntrypoint.open_dataset passes None to its store; only
# ZarrStore.open_group takes the option into account.
# This script fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q xarray==2026.9.0 zarr==3.1.6 numpy==2.4.6
cd "$folder"
env -u PYTHONPATH venv/bin/python - <<'PROGRAM'
import numpy as np
import xarray as xr
import zarr

print("xarray", xr.__version__, "zarr", zarr.__version__, "numpy", np.__version__)
array = zarr.create_group("u.zarr", zarr_format=2).create_array(
    "u", shape=(3,), chunks=(3,), dtype="f8", fill_value=0
)
array.attrs["_ARRAY_DIMENSIONS"] = ["x"]
array[:] = np.array([0.0, 1.0, 2.0])
options = {"consolidated": False, "use_zarr_fill_value_as_mask": False}
by_function = xr.open_dataset("u.zarr", engine="zarr", **options).u.values
by_store = xr.open_dataset(xr.backends.ZarrStore.open_group("u.zarr", mode="r", **options)).u.values
print("open_dataset:", by_function, "ZarrStore:", by_store)
assert np.isnan(by_function[0]), "the option has an effect now"
assert by_store[0] == 0
PROGRAM
