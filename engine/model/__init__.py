"""What nnU-Net trained, read safely: plans, checkpoints, networks."""
