"""The learner group: rank actors over a backend (DeepSpeed, plain torch)."""
