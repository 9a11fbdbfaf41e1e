"""What computes a fused student: one module an engine."""
