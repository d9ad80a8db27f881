"""Ray sessions, placement and job submission."""
