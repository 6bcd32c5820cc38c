"""Building bundles, and the whole path as one file."""
