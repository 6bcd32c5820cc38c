"""Measures nnturbo against nnU-Net itself; most modules are commands that write JSON."""
