"""Calibration data: the dataset-string grammar, where documents come from, and how they become token batches."""
