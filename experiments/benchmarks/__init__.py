"""The programs that are timed, and how they are timed."""
