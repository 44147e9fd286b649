"""Model families: one folder each, a ModelSpec and a list of stages."""
