"""Model folders and what is in them.

A ``ModelFolder`` is opened once and knows its layout (``transformers``, ``open_clip``, a ``peft``
adapter), its weight files and its settings. A ``Checkpoint`` lists its tensors by canonical name;
they are read one at a time, when asked for.
"""
