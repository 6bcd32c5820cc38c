"""Measures nnturbo against nnU-Net itself; every module here is a command that writes JSON."""
