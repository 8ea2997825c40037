"""``action=chat``: conversations with finished models in the terminal, in a process of its own."""
