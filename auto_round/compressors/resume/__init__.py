"""What lets a run that was killed go on where it was: see docs/resume.md and docs/adr/0012-journal.md."""
