"""`make gpu-proof`: every kernel on this machine's GPU, against its twin, against the ceilings, in one table."""
