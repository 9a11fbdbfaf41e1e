"""Distances between sets of images, and the report."""
