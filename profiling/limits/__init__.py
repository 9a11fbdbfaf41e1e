"""Limits of the software: kills, faulty file systems, damaged files and odd inputs, tried many times; kernels as compiled."""
