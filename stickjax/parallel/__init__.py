"""Several devices and several processes: chips, the mesh, partitions, collectives, and how processes meet."""
