"""The page of `explore`: what it shows, as functions of arrays, its template, style and script."""
