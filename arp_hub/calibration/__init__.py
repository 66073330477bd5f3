"""Calibration images, passes over them, second moments, and the regression that these pose."""
