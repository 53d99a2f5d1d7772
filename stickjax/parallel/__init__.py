"""Several devices and processes: the mesh, collectives, makes of GPU and their speeds, how processes find each other."""
