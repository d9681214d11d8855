"""The command line and what it submits; with cluster/ the only place that imports ray."""
