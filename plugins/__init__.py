"""Attention kernels and their TensorRT registration (empty until they are written)."""
