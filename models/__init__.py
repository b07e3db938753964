"""Tensors, with the network unplugged."""

import petals

# `petals.models.llama` and other modules of Petals are in petals/compat/models.
__path__.extend(f"{folder}/models" for folder in petals.__path__[1:])
