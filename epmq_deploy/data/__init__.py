"""Tasks' data: samples and their labels, prompts, pseudo-labels, heads, and agreement of models.

``loading`` opens a data source (``rows``), checks it (``columns``) and returns ``samples``, whose
batches are model inputs. ``prompts`` and ``pseudo_labels`` serve text generation, ``heads``
classifiers. ``agreement`` and ``accuracy`` compare predictions with experts and with labels.
"""
