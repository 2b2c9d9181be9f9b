"""Choose metrics for a stage: settings, fields, ranges of values, and what rounding hides."""
