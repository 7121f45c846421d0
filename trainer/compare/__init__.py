"""Comparison of runs: reads run folders without torch, computes statistics over seeds, writes a table and figures."""
