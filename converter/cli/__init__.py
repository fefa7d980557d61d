"""The commands `bwla-convert`, `bwla-eval` and `bwla-inspect`."""

import os

# Threads that wait for each other sleep. By default they spin, which takes the cores from other processes, and where
# these keep a thread from running, all others spin until it does. OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
