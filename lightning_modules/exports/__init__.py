"""A trained model in the files that other runtimes read, a file a format, and the check that it still answers alike."""
