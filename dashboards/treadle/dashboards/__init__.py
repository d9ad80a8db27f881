"""What people look at: the run report and its parts."""
