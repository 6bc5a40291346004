"""What ``launch/benchmark.py`` times: the claims of the docs, as ratios within one run."""
