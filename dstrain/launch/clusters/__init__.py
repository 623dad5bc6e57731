"""Existing engines that start a run on many hosts: each gets from one description of the run what it needs."""
