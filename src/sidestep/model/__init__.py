"""A backbone with a task attached: the side network or the diff, the head, and what trainers see of them."""
