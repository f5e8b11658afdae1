"""What watches a run, each in a file: plan, horizon, speed, progress, samples, report."""
