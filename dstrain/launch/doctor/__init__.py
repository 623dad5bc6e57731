"""`dstrain doctor`: whether this machine and the hosts of a hostfile can carry a run, before it starts."""
