"""Several devices and several processes: GPU models, the mesh, collectives, and how processes find one another."""
