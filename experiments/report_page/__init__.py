"""The HTML page of `experiments.report`: its input, its charts, its template and its style."""
