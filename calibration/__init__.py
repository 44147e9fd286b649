"""Calibration: observers, scales and quantised weights (empty until it is written)."""
