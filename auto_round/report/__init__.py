"""Reporting of a run: memory and progress while it runs, report.json and a model card afterwards."""
