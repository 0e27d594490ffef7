"""Fine-tuning of pretrained transformers with every method of the package, measured side by side.

:mod:`.data` reads task files, :mod:`.models` loads a model and puts a head on it, :mod:`.methods` lists the ways to adapt it,
:mod:`.training` makes one run, :mod:`.results` and :mod:`.plots` keep and show many, :mod:`.command` is the command line's.
"""
