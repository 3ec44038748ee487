"""Quantizing a merged model to integer codes.

``stage`` turns a merged folder into the quantized artifact. ``sequential`` goes through the model
block by block: ``expert_features``, ``norms``, ``group_statistics`` and ``group`` are the parts of
quantizing one block, ``embeddings`` quantizes what lies outside the blocks. A method in ``methods``
states the problem of a layer, and ``solver`` finds its codes. ``guidance`` weighs tokens by
gradients, ``planning`` settles options that depend on the model. ``phases`` says what comes after
what: ``distillation`` trains all weights before codes are chosen, and tunes scales, biases and
norms afterwards; ``residuals`` corrects layers for every task. ``results`` and ``artifact`` hold
the outcome in memory and on disk.
"""
