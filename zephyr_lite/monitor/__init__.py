"""Progress of a stage: a panel in a terminal, lines in a pipe, JSON for programs; and the report."""
