"""Training data: images, recorded trajectories, the order of both and every random draw."""
