"""Bounds that hold for every input in a box: interval, CROWN, Lipschitz and smoothing certificates, and training."""
