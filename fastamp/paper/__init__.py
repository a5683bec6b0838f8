"""The paper's experiments: what they consist of, their runs in parallel processes, and their tables and plots."""
