"""A small trained HunyuanVideo, shipped with the project, and the recipe that trained it."""
