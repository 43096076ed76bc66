"""Measurements that anyone can repeat: `make bench`. Every claim of speed is a ratio taken in one run."""
