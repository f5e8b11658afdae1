"""Pages that open without a network: of a run, and of several beside each other."""
