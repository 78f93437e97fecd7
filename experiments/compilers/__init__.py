"""Ahead-of-time compilation for GPUs and TPUs, and the costs of the compiled code."""
