"""Compiled models on disk: what is in them, how they are opened, and those kept for the next time."""
