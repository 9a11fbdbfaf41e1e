"""The student, the fused student and the critic: plain ``nn.Module``s with a typed configuration."""
