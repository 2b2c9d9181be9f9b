"""Find, download and read source data: catalogs, downloads, and a reader for each format."""
