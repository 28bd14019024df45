"""The sensitivity analysis of a run, stored in its directory."""
