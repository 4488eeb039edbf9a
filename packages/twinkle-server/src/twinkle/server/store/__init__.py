"""What outlives the process: rows in a database, checkpoint files in a directory."""
