"""LST: a small Transformer beside the frozen one."""
