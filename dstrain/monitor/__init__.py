"""What a run measures, shows and leaves behind: metrics.jsonl, the progress line, logs, trackers, report.html."""
