"""Writing the result: shards, folders that show only whole results, and what is checked before they are shown."""
