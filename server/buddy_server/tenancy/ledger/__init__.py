"""What every request used: one row each, which outlives the process."""
