"""Files, locks, memory, profiling, and text for a terminal. This package imports no other part of stickjax."""
