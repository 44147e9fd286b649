"""Bundles as models of Triton Inference Server: a repository of them, and what runs inside the server."""
