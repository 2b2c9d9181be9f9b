"""Read and write stores: the only Zarr I/O of the project, its schema, addresses, locks and hashes."""
