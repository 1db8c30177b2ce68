"""What the command line calls, a file a command: its flags, and what it prints."""
