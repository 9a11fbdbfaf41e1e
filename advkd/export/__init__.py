"""Exports: diffusers' pipelines and exchange formats."""
