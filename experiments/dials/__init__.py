"""Other ways to one policy for every N, measured against the tilted one."""
