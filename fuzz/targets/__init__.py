"""A module for each target; `load` in fuzz/target.py imports the one that is wanted."""
