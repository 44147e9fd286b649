"""Engines: loaded stages. ``engine`` says what an engine is; one module per backend implements it."""
