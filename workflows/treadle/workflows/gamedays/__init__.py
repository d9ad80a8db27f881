"""Game days: a run that is disturbed as planned, and an account of what became of it (`treadle chaos`)."""
