"""Services of the machine: files, locks, memory, text for a terminal. They import no other part of stickjax."""
