#!/usr/bin/env bash
# the_well 1.2.0: WellDataset cannot load a field that varies along one of two dims, stored as its format says.
# Expected: docs/data_format.md lists such a field, `FieldC: float32(BxTxH)` with dim_varying = [True, False]: the
# dim in which it does not vary is not stored, and the loader repeats the values along it.
# Observed: RuntimeError, since the missing axis is tiled at another place. It loads only where the file keeps the
# axis, with length 1.
# This script fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q the_well==1.2.0 torch==2.13.0 h5py==3.16.0
cd "$folder"
env -u PYTHONPATH venv/bin/python - <<'PROGRAM'
import os
from importlib.metadata import version

import h5py
import numpy as np
from the_well.data import WellDataset
from the_well.utils.dummy_data import write_dummy_data

print("the_well", version("the_well"), "torch", version("torch"), "h5py", h5py.__version__)


def load(shape):
    """Add a field that varies along x alone to the package's own example, and load a sample."""
    folder = "x".join(map(str, shape))
    os.mkdir(folder)
    write_dummy_data(f"{folder}/data.hdf5")
    with h5py.File(f"{folder}/data.hdf5", "r+") as file:
        fields = file["t0_fields"]
        fields.attrs["field_names"] = ["constant_field", "profile"]
        fields["profile"] = np.zeros(shape, np.float32)
        fields["profile"].attrs.update({"dim_varying": [True, False], "sample_varying": True, "time_varying": True})
    data = WellDataset(path=folder, n_steps_input=3, n_steps_output=1, use_normalization=False)
    return tuple(data[0]["input_fields"].shape)


print("axis kept, length 1:", load((2, 10, 32, 1)))
try:
    shape = load((2, 10, 32))
except RuntimeError as error:
    print("axis not stored: RuntimeError:", error)
else:
    raise SystemExit(f"a field without the axis loads now: {shape}")
PROGRAM
