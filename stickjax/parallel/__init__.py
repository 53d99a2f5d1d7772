"""Several devices and several processes: GPUs, the mesh, partitions, collectives, and the start of processes."""
