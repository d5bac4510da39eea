"""Ray's cluster: connecting to it or starting it, the environment of its processes, and its errors."""
