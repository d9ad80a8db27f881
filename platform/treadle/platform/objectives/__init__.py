"""Training objectives as pure maths: one small file per algorithm, one registry line each."""
