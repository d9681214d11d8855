"""The training loop and what keeps it running."""

MARKER = "COMMIT.json"  # in the folder of a committed checkpoint; here, so that a driver can look without torch
