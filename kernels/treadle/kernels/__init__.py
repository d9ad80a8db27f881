"""Tensor operations with an eager twin each; imports nothing of ours."""
