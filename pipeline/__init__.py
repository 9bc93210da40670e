"""One module per DVC stage, and what the stages share."""
