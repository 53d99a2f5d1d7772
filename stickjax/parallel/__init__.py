"""Training on several devices and in several processes: the mesh, the collectives, GPU models, and processes."""
