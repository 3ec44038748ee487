"""The ``epmq`` command line: thin wrappers around the stages."""
