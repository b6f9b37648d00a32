"""Find a schedule for a model: tables of time and loss, an exact search over them, and the best measured for real."""
