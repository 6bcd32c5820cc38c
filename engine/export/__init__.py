"""Builds bundles, and writes the whole path from a scan to its labels as one file."""
