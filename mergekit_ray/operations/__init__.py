"""What can be done with models: a file for each verb of the command line, which Python calls too."""
