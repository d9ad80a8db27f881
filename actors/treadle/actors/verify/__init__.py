"""Verifiers: pure scoring functions and the pool of killable processes that runs them."""
