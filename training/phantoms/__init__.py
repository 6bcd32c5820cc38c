"""Phantoms: CT-like scans with a pancreas and one lesion, made from a seed."""
