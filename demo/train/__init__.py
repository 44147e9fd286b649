"""Training of the demonstration model. Development only: needs torch, diffusers and transformers."""
