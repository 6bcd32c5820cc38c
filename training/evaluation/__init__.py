"""Evaluation: predictions compared with the truth, and packed for submission."""
