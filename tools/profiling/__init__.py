"""What ``reelforge profile`` measures, compares, advises and shows."""
