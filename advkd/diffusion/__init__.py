"""The teacher's side: noise levels, sampler steps, schedulers, recordings."""
