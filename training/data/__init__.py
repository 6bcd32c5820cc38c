"""Data sets: finding their cases, converting them for nnU-Net, planning and preprocessing."""
