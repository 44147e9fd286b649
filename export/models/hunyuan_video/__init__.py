"""HunyuanVideo: modules, key maps and stages."""
