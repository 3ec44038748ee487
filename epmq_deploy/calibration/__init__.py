"""Running a model's blocks on calibration data, and statistics of what its layers receive.

``block_runner`` moves the batches of all tasks from block to block, ``activations`` runs one block
on one batch, ``cache`` holds activations in between, and ``statistics`` sums what layers receive.
Merging and quantization both build on these.
"""
