"""The report of a run: its figures, samples, summary and page."""
