"""What a report says of each kind of run: numbers, sentences and figures, which report.py puts on a page."""
