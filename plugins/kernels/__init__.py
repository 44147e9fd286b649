"""The Triton kernels, one file each, with their NumPy references beside them; importing a kernel imports Triton."""
