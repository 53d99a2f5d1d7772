"""What the machine gives: files, locks, memory, text for a terminal. Imports nothing else of stickjax."""
