"""What is done to releases without the plugin, a scenario a file; transcripts.py keeps what they did."""
