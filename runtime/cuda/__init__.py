"""The CUDA runtime without a framework: ``driver`` calls it, ``memory`` and ``graph`` give its objects lifetimes.

It is reached through cuda-python, which is imported when a GPU is opened. Nothing here knows engines or stages.
"""
