"""Tasks in use: loaded, added up, predicted with, and kept many to a backbone in a bank."""
