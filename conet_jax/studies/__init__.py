"""What is made of many runs: searches, sweeps, tables, figures."""
