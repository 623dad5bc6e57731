"""Before a run: what it needs, and how it is started."""
