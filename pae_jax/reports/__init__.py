"""Tables and pictures: who owns what, and how large it is."""
