"""Trains and evaluates multi-task models."""
