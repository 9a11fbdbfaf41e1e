"""Engines that compute a fused student, one a module."""
