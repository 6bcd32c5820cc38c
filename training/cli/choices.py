"""Copies of constants of modules that import numpy or torch; a test compares them."""

PHANTOM_COUNTS = {"train": 252, "validation": 36, "test": 72}
PLANNERS = ("resenc", "resenc_l", "resenc_xl", "plain", "compact")
PRESETS = ("balanced", "conservative", "aggressive", "segmentation_focused")
CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")
TAKE = ("simplest", "best")
