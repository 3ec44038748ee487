"""The ``epmq`` command line: thin wrappers around the stages."""

import os

# Read when torch is imported, which comes later. Threads that wait by spinning make torch dozens
# of times slower wherever there are fewer free cores than threads: containers, shared machines.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
