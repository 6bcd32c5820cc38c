"""Produces multi-task models."""
