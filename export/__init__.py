"""Compiler: checkpoints, model definitions, capture, passes and engine builders."""
