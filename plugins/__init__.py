"""Attention kernels for 8-bit tensor cores, compiled ahead of time for GPUs that need not be here."""
