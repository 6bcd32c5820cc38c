"""Files in: scans as nnU-Net's readers see them, and labels out."""
