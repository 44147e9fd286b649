"""Sparse attention at run time: orders of tokens, patterns of blocks, tables of windows, and what ``dit`` is given."""
