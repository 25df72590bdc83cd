"""What is told about a run: progress while it goes on, a report and a model card afterwards."""
