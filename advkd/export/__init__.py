"""What leaves the package: diffusers' pipelines and exchange formats."""
