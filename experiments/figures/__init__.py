"""Figures: functions of arrays that return Matplotlib figures."""
