"""Graph passes, one file each; `export.lower` is the ordered list per target."""
