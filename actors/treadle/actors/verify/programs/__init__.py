"""Programs written by a model, run in a sandbox and judged outside it."""
