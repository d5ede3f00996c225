"""Memory and speed of a training over many steps."""
