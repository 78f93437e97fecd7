"""The routing engine: passes over votes that are never stored, and the unrolled iterations."""
