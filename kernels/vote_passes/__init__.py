"""The engine under all routings: passes over votes that are never stored, and their unrolling."""
