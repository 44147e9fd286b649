"""Checkpoint readers: where each tensor lies, and how a stage's weights are found there."""
