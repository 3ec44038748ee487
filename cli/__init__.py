"""The ``epmq`` command line: parsing of arguments and printing of results, around the stages.

Importing it changes nothing; ``epmq_deploy.cli.main.main`` is the entry point, and what it sets for
the whole process is in ``epmq_deploy.cli.process``.
"""
