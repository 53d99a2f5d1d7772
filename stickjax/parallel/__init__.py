"""Training on several devices and in several processes: the mesh, the collectives, the speeds of
known GPUs, and the processes.
"""
