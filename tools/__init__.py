"""The command line and reports."""
