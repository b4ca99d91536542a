"""The instrument: what a search costs on this machine, and the least it could cost."""
