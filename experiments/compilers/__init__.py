"""Ahead-of-time compilation for GPUs and TPUs, and what the compiled code costs."""
