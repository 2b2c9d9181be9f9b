"""Metrics of a stage: settings, fields, pixel weights, ranges of values, and effects of rounding."""
