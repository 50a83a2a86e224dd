"""Does it help? Arms × seeds, their statistics, and the report."""
