"""Functions for files, locks, memory, profiling and terminals. This package imports no other part of stickjax."""
