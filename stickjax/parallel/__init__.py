"""Several devices and processes: the mesh, collectives, makes of GPU with their speeds, and how processes meet."""
