"""What can be done with models: one file for each verb of the command line, and its twin in Python."""
