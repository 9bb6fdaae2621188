"""`python -m sidestep.cli`."""

from sidestep.cli import app

app()
