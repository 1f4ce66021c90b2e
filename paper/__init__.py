"""What makes the paper of results: only report.py imports it."""
