"""Calibration: number formats, statistics, scales, smoothing and scale files; what observes engines is not here yet."""
