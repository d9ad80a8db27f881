"""Rollout workers: engines that draw samples, and the pool that routes groups to them."""
