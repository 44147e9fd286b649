"""Sampling runtime: bundles, engines, pipeline, video files. numpy only; no torch, no onnx."""
