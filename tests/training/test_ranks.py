"""Two processes compute what one does: losses, gradients, scores, files. One that ends ends the other."""

from __future__ import annotations
