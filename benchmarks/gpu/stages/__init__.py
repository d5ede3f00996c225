"""The stages. Each is a process of its own, in which ``run(context)`` is called."""
