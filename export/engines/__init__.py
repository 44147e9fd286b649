"""Engines: graphs compiled to TensorRT and TensorRT-RTX plans, each in a child process, with a receipt."""
