"""Ray's cluster: connecting to it or starting it, what is passed to it, and what its errors mean."""
